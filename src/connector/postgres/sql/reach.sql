-- In: name, reach. Makes session_user a member of the lease through a role that nobody has seen yet, so that no lock and
-- no REVOKE of the lease can be in its way. Always rolled back by the caller: signals that were sent meanwhile stay sent.
BEGIN
  EXECUTE format('CREATE ROLE %I NOLOGIN ROLE %I', p_in->>'reach', session_user);
  EXECUTE format('GRANT %I TO %I', p_in->>'name', p_in->>'reach');
  p_out := 'true';
END;
