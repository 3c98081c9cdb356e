-- In: reach, into. Makes session_user a member of the roles in `into` (a lease, or groups) through a role that nobody has seen yet,
-- so that no lock and no REVOKE of a lease can be in its way, and no lease gets anything. Rolled back or dropped by the caller: signals
-- that were sent meanwhile stay sent.
DECLARE
  v_into text;
BEGIN
  SELECT string_agg(quote_ident(r.rolname), ', ') INTO v_into FROM pg_roles r
   WHERE r.rolname IN (SELECT jsonb_array_elements_text(p_in->'into'))
     AND NOT (r.rolsuper OR r.rolcreaterole OR r.rolcreatedb OR r.rolreplication OR r.rolbypassrls);
  EXECUTE format('CREATE ROLE %I NOLOGIN ROLE %I', p_in->>'reach', session_user);
  IF v_into IS NOT NULL THEN
    EXECUTE format('GRANT %s TO %I', v_into, p_in->>'reach');
  END IF;
  p_out := 'true';
END;
