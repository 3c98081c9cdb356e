-- In: name, groups. Gives a role that is cut, silent and can't log in its groups back, for as long as it takes to drop what it owns one
-- by one: DROP resolves names with the rights of who owns them. The role's own end takes them away again, and so does cut.
DECLARE
  v_groups text;
BEGIN
  IF EXISTS (SELECT FROM pg_roles WHERE rolname = p_in->>'name' AND rolcanlogin) THEN
    RAISE EXCEPTION 'this role can still log in' USING ERRCODE = 'CS007';
  END IF;
  SELECT string_agg(quote_ident(r.rolname), ', ') INTO v_groups FROM pg_roles r
   WHERE r.rolname IN (SELECT jsonb_array_elements_text(p_in->'groups'))
     AND NOT (r.rolsuper OR r.rolcreaterole OR r.rolcreatedb OR r.rolreplication OR r.rolbypassrls OR r.rolcanlogin);
  IF v_groups IS NOT NULL THEN
    EXECUTE format('GRANT %s TO %I', v_groups, p_in->>'name');
  END IF;
  p_out := 'true';
END;
