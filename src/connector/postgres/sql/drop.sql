-- In: lock_ms, roles [{name}]. Out: [{name, error}]. Each role is one subtransaction: all of it or nothing.
DECLARE
  v text;
  v_error jsonb;
BEGIN
  p_out := '[]';
  PERFORM set_config('lock_timeout', p_in->>'lock_ms', true);
  FOR v IN SELECT j->>'name' FROM jsonb_array_elements(p_in->'roles') AS j LOOP
    v_error := NULL;
    BEGIN
      EXECUTE format('DROP OWNED BY %I CASCADE', v);
      EXECUTE format('DROP ROLE %I', v);
    EXCEPTION WHEN undefined_object THEN NULL; WHEN OTHERS THEN
      v_error := jsonb_build_object('code', SQLSTATE, 'at', 'DROP', 'message', SQLERRM);
    END;
    p_out := p_out || jsonb_build_object('name', v, 'error', v_error);
  END LOOP;
END;
