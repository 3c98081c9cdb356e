-- In: name, max. Out: how many were dropped. Drops at most max of the objects that a role owns in this database: DROP OWNED takes one
-- lock for each, and the lock table is finite. What can't be dropped one by one is left to DROP OWNED.
DECLARE
  v record;
  v_dropped int := 0;
BEGIN
  FOR v IN SELECT s.classid, s.objid FROM pg_shdepend s JOIN pg_roles r ON r.oid = s.refobjid
            WHERE s.refclassid = 'pg_authid'::regclass AND r.rolname = p_in->>'name' AND s.deptype = 'o'
              AND s.dbid = (SELECT oid FROM pg_database WHERE datname = current_database())
              AND s.classid IN ('pg_class'::regclass, 'pg_largeobject'::regclass, 'pg_proc'::regclass)
            LIMIT (p_in->>'max')::int LOOP
    BEGIN
      IF v.classid = 'pg_largeobject'::regclass THEN
        PERFORM lo_unlink(v.objid);
      ELSE
        EXECUTE (SELECT format('DROP %s %s CASCADE', o.type, o.identity) FROM pg_identify_object(v.classid, v.objid, 0) AS o);
      END IF;
      v_dropped := v_dropped + 1;
    EXCEPTION WHEN undefined_object OR undefined_table OR undefined_function OR wrong_object_type OR dependent_objects_still_exist
      OR syntax_error OR insufficient_privilege THEN NULL;
    END;
  END LOOP;
  p_out := to_jsonb(v_dropped);
END;
