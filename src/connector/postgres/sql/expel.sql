-- In: oids. Out: how many sessions were sent away. By membership; what that doesn't reach is done role by role afterwards.
DECLARE
  v_pid int;
  v_sent int := 0;
BEGIN
  FOR v_pid IN SELECT s.pid FROM pg_stat_get_activity(NULL) AS s
                WHERE s.usesysid IN (SELECT j::oid FROM jsonb_array_elements_text(p_in->'oids') AS j) LOOP
    BEGIN
      IF pg_terminate_backend(v_pid) THEN
        v_sent := v_sent + 1;
      END IF;
    EXCEPTION WHEN insufficient_privilege THEN NULL;
    END;
  END LOOP;
  p_out := to_jsonb(v_sent);
END;
