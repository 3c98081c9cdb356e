-- In: name, verifier, lifetime_secs, connection_limit, groups. Out: oid.
-- One statement, one transaction: an error leaves nothing behind. A name that is taken (42710) and a group that is
-- missing (42704) are CREATE ROLE's own errors.
DECLARE
  v_name text := p_in->>'name';
  v_sixteen boolean := current_setting('server_version_num')::int >= 160000;
  v_groups text;
  v_bad text;
BEGIN
  -- A member may SET ROLE to whatever it reaches, so attributes of groups count although they are not inherited.
  WITH RECURSIVE reached(oid) AS (
    SELECT to_regrole(quote_ident(g))::oid FROM jsonb_array_elements_text(p_in->'groups') AS g
    UNION SELECT m.roleid FROM pg_auth_members m JOIN reached ON m.member = reached.oid)
  SELECT string_agg(quote_ident(r.rolname), ', ' ORDER BY r.rolname) INTO v_bad FROM reached JOIN pg_roles r USING (oid)
   WHERE r.rolsuper OR r.rolcreaterole OR r.rolcreatedb OR r.rolreplication OR r.rolbypassrls OR r.rolcanlogin
      OR starts_with(r.rolname, 'pg_') AND r.rolname NOT IN ('pg_read_all_data', 'pg_write_all_data', 'pg_monitor',
           'pg_read_all_settings', 'pg_read_all_stats', 'pg_stat_scan_tables', 'pg_database_owner');
  IF v_bad IS NOT NULL THEN
    RAISE EXCEPTION 'these groups lead to more than data (LOGIN, SUPERUSER, CREATEROLE, server programs …): %', v_bad
      USING ERRCODE = 'CS003';
  END IF;
  SELECT string_agg(DISTINCT quote_ident(g), ', ') INTO v_groups FROM jsonb_array_elements_text(p_in->'groups') AS g;
  EXECUTE format('CREATE ROLE %I LOGIN NOSUPERUSER NOCREATEDB NOCREATEROLE NOREPLICATION NOBYPASSRLS INHERIT PASSWORD %L'
                 ' VALID UNTIL %L CONNECTION LIMIT %s %s ROLE %s',
    v_name, p_in->>'verifier', clock_timestamp() + make_interval(secs => (p_in->>'lifetime_secs')::int),
    (p_in->>'connection_limit')::int, CASE WHEN v_sixteen THEN '' ELSE 'IN ROLE ' || v_groups END,
    -- Members, so that they may end its sessions and drop what it owns.
    quote_ident(session_user) || CASE WHEN current_user = session_user THEN '' ELSE ', ' || quote_ident(current_user) END);
  IF v_sixteen THEN
    EXECUTE format('GRANT %s TO %I WITH INHERIT TRUE, SET FALSE', v_groups, v_name);
  END IF;
  p_out := jsonb_build_object('oid', to_regrole(quote_ident(v_name))::oid::bigint);
END;
