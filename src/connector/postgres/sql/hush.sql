-- In: roles [{name}], pids. Out: [{name, killed, error}]. Terminates those of the pids that belong to each role, *as* that
-- role: a member of all leases would also hit other leases' sessions, which may look the same before they have a name.
DECLARE
  v text;
  v_pid int;
  v_killed jsonb;
  v_error jsonb;
BEGIN
  p_out := '[]';
  FOR v IN SELECT j->>'name' FROM jsonb_array_elements(p_in->'roles') AS j LOOP
    v_killed := '[]';
    v_error := NULL;
    BEGIN
      PERFORM set_config('role', v, true);
      FOR v_pid IN SELECT j::int FROM jsonb_array_elements_text(p_in->'pids') AS j LOOP
        BEGIN
          IF pg_terminate_backend(v_pid) THEN
            v_killed := v_killed || to_jsonb(v_pid);
          END IF;
        EXCEPTION WHEN insufficient_privilege THEN NULL;
        END;
      END LOOP;
      PERFORM set_config('role', 'none', true);
    EXCEPTION WHEN OTHERS THEN
      v_error := jsonb_build_object('code', SQLSTATE, 'at', 'terminate', 'message', SQLERRM);
    END;
    p_out := p_out || jsonb_build_object('name', v, 'killed', v_killed, 'error', v_error);
  END LOOP;
END;
