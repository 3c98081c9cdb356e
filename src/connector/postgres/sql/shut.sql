-- In: lock_ms, roles [{name}]. Out: {taken, failed}, memberships. Many at once, before anything else is done with any of them: without
-- its groups a lease has no CONNECT and no data. What fails here is done role by role afterwards (cut), so that it may.
DECLARE
  v_row record;
  v_taken int := 0;
  v_failed int := 0;
BEGIN
  PERFORM set_config('lock_timeout', p_in->>'lock_ms', true);
  FOR v_row IN
    SELECT m.granted, string_agg(m.member, ', ') AS members, count(*)::int AS n
      FROM (SELECT a.roleid::regrole::text AS granted, a.member::regrole::text AS member,
                   (row_number() OVER (PARTITION BY a.roleid) - 1) / 500 AS part
              FROM pg_auth_members a JOIN pg_roles r ON r.oid = a.member
             WHERE r.rolname IN (SELECT j->>'name' FROM jsonb_array_elements(p_in->'roles') AS j)) AS m
     GROUP BY m.granted, m.part LOOP
    BEGIN
      EXECUTE format('REVOKE %s FROM %s', v_row.granted, v_row.members);
      v_taken := v_taken + v_row.n;
    EXCEPTION WHEN OTHERS THEN v_failed := v_failed + v_row.n;
    END;
  END LOOP;
  p_out := jsonb_build_object('taken', v_taken, 'failed', v_failed);
END;
