//! What a command gets: variables, and files in memory. Each credential goes in its tool's own way. For PostgreSQL
//! that is libpq's: the passwords are in an anonymous file, never in a variable.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write as _;
use std::os::fd::{AsRawFd as _, OwnedFd};

use rustix::fs::{MemfdFlags, Mode};
use zeroize::Zeroizing;

use super::ClientError;
use crate::core::secret::Secret;
use crate::wire::agent::{CredentialView, Credentials};

/// The variable that names the grant.
const GRANT: &str = "COUNTERSIGN_GRANT";
/// Variables that prove who we are. The command has credentials of its own and needs none of them.
const OURS: [&str; 7] = [
    "COUNTERSIGN_TOKEN",
    "COUNTERSIGN_TOKEN_FILE",
    "COUNTERSIGN_SVID_CERT",
    "COUNTERSIGN_SVID_KEY",
    "SPIFFE_ENDPOINT_SOCKET",
    "ACTIONS_ID_TOKEN_REQUEST_URL",
    "ACTIONS_ID_TOKEN_REQUEST_TOKEN",
];
/// What of a PostgreSQL credential goes into which of libpq's variables.
const LIBPQ: [(&str, &str); 6] = [
    ("host", "PGHOST"),
    ("port", "PGPORT"),
    ("dbname", "PGDATABASE"),
    ("user", "PGUSER"),
    ("sslmode", "PGSSLMODE"),
    ("sslrootcert", "PGSSLROOTCERT"),
];
/// libpq's variables that would win over ours, or change where and how it connects (PostgreSQL, "Environment Variables").
const LIBPQ_OTHERS: [&str; 19] = [
    "PGPASSWORD",
    "PGPASSFILE",
    "PGSERVICE",
    "PGSERVICEFILE",
    "PGHOSTADDR",
    "PGOPTIONS",
    "PGREQUIREAUTH",
    "PGREQUIREPEER",
    "PGREQUIRESSL",
    "PGCHANNELBINDING",
    "PGGSSENCMODE",
    "PGSSLNEGOTIATION",
    "PGSSLCERT",
    "PGSSLKEY",
    "PGSSLCERTMODE",
    "PGSSLCRL",
    "PGSSLCRLDIR",
    "PGTARGETSESSIONATTRS",
    "PGLOADBALANCEHOSTS",
];

/// Variables to set and to take away, and the files behind them. They are there while this is.
#[derive(Default)]
pub struct Handover {
    set: BTreeMap<String, Secret>,
    scrub: BTreeSet<&'static str>,
    files: Vec<OwnedFd>,
}

impl Handover {
    /// Each credential in its tool's own way.
    pub fn of(given: &Credentials) -> Result<Self, ClientError> {
        let mut out = Self { scrub: OURS.into(), ..Self::default() };
        out.set(GRANT.to_owned(), Secret::new(given.grant.to_string()))?;
        let mut libpq = Libpq::default();
        for credential in &given.credentials {
            let mut public = credential.public.clone();
            let mut secret: BTreeMap<&String, &Secret> = credential.secret.iter().collect();
            if credential.kind == "postgres" {
                libpq.add(&mut out, &mut public, credential)?;
                secret.retain(|field, _| *field != "password");
            }
            for (field, value) in public {
                out.set(variable(&credential.resource, &field), Secret::new(value))?;
            }
            for (field, value) in secret {
                out.set(variable(&credential.resource, field), value.clone())?;
            }
        }
        libpq.finish(&mut out)?;
        Ok(out)
    }

    /// Gives it to a command.
    pub fn apply(&self, command: &mut tokio::process::Command) {
        for name in &self.scrub {
            command.env_remove(name);
        }
        for (name, value) in &self.set {
            command.env(name, value.expose());
        }
    }

    /// What it does to the environment, a line each, never a value. `is_there`: is there such a variable now?
    pub fn in_words(&self, is_there: impl Fn(&str) -> bool) -> Vec<String> {
        let sets = self.set.keys().map(|name| format!("sets {name}"));
        let takes = self.scrub.iter().filter(|name| !self.set.contains_key(**name) && is_there(name));
        sets.chain(takes.map(|name| format!("takes away {name}"))).collect()
    }

    fn set(&mut self, name: String, value: Secret) -> Result<(), ClientError> {
        if OURS.contains(&name.as_str()) || self.set.contains_key(&name) {
            return Err(taken(&name));
        }
        self.set.insert(name, value);
        Ok(())
    }

    /// An anonymous file, readable for our user alone. Its path is good in every process of ours, also in a child's
    /// child that inherits nothing, for as long as we live.
    fn file(&mut self, name: &str, text: &str) -> Result<String, ClientError> {
        let fail = |e: std::io::Error| ClientError::Settings(format!("no file in memory for the command: {e}"));
        let file = rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC).map_err(|e| fail(e.into()))?;
        rustix::fs::fchmod(&file, Mode::RUSR | Mode::WUSR).map_err(|e| fail(e.into()))?;
        let mut writer = std::fs::File::from(file);
        writer.write_all(text.as_bytes()).map_err(fail)?;
        let path = format!("/proc/{}/fd/{}", std::process::id(), writer.as_raw_fd());
        self.files.push(writer.into());
        Ok(path)
    }
}

/// libpq's way: a password file with a line for each credential, and the variables on which all of them agree. With
/// several databases, what differs has no default: the command takes it from `COUNTERSIGN_…`.
#[derive(Default)]
struct Libpq {
    lines: Zeroizing<String>,
    agreed: Option<BTreeMap<&'static str, String>>,
    /// CA → its file.
    roots: BTreeMap<String, String>,
}

impl Libpq {
    fn add(
        &mut self,
        out: &mut Handover,
        public: &mut BTreeMap<String, String>,
        credential: &CredentialView,
    ) -> Result<(), ClientError> {
        if let Some(pem) = public.remove("sslrootcert_pem") {
            let path = match self.roots.get(&pem) {
                Some(path) => path.clone(),
                None => out.file("root.crt", &pem)?,
            };
            self.roots.insert(pem, path.clone());
            public.insert("sslrootcert".to_owned(), path);
        }
        let text = |name: &str| public.get(name).map_or("", String::as_str);
        let password = credential.secret.get("password").map_or("", Secret::expose);
        // A socket's folder that is libpq's default is looked up by another name.
        let socket = text("host").starts_with('/').then_some("localhost");
        for host in std::iter::once(text("host")).chain(socket) {
            for (i, field) in [host, text("port"), text("dbname"), text("user"), password].into_iter().enumerate() {
                if field.contains(['\n', '\r']) {
                    let why = format!("the credential for {} has a line break", credential.resource);
                    return Err(ClientError::Answer(why));
                }
                self.lines.push_str(if i == 0 { "" } else { ":" });
                for c in field.chars() {
                    if matches!(c, ':' | '\\') {
                        self.lines.push('\\');
                    }
                    self.lines.push(c);
                }
            }
            self.lines.push('\n');
        }
        let own: BTreeMap<&str, String> =
            LIBPQ.iter().filter_map(|(field, name)| Some((*name, public.get(*field)?.clone()))).collect();
        match &mut self.agreed {
            None => self.agreed = Some(own),
            Some(agreed) => agreed.retain(|name, value| own.get(name) == Some(value)),
        }
        Ok(())
    }

    fn finish(self, out: &mut Handover) -> Result<(), ClientError> {
        let Some(agreed) = self.agreed else { return Ok(()) };
        out.scrub.extend(LIBPQ_OTHERS);
        out.scrub.extend(LIBPQ.map(|(_, name)| name));
        let passwords = out.file("pgpass", &self.lines)?;
        out.set("PGPASSFILE".to_owned(), Secret::new(passwords))?;
        for (name, value) in agreed {
            out.set(name.to_owned(), Secret::new(value))?;
        }
        Ok(())
    }
}

/// `COUNTERSIGN_<RESOURCE>_<FIELD>`.
fn variable(resource: &str, field: &str) -> String {
    let name = |text: &str| -> String {
        text.chars().map(|c| if c.is_ascii_alphanumeric() { c.to_ascii_uppercase() } else { '_' }).collect()
    };
    format!("COUNTERSIGN_{}_{}", name(resource), name(field))
}

/// Refuses resources whose variables would have one name, before anybody is asked for them.
pub fn check<'a>(resources: impl Iterator<Item = &'a str>) -> Result<(), ClientError> {
    let mut seen = BTreeSet::new();
    for resource in resources {
        let name = variable(resource, "");
        if !seen.insert(name.clone()) {
            return Err(taken(&format!("{name}…")));
        }
    }
    Ok(())
}

fn taken(name: &str) -> ClientError {
    ClientError::Settings(format!(
        "two things would be handed over as {name}; ask for them one by one, each with an `exec` of its own"
    ))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use serde_json::{Value, json};

    use super::*;
    use crate::core::id::{GrantId, LeaseId};

    fn given(credentials: &[Value]) -> Credentials {
        let credentials: Vec<Value> = credentials
            .iter()
            .map(|c| {
                let mut c = c.clone();
                c["lease"] = json!(LeaseId::from_bytes([2; 16]));
                c
            })
            .collect();
        let grant = GrantId::from_bytes([1; 16]);
        serde_json::from_value(json!({ "grant": grant, "ends_at": 1, "credentials": credentials })).unwrap()
    }

    fn pg(resource: &str, database: &str, user: &str, password: &str, pem: Option<&str>) -> Value {
        let mut public = json!({ "host": "db.corp", "port": "5432", "dbname": database, "user": user });
        public["sslmode"] = json!(if pem.is_some() { "verify-full" } else { "disable" });
        if let Some(pem) = pem {
            public["sslrootcert_pem"] = json!(pem);
        }
        json!({ "resource": resource, "kind": "postgres", "public": public, "secret": { "password": password } })
    }

    fn token(resource: &str) -> Value {
        let public = json!({ "audience": "https://a" });
        json!({ "resource": resource, "kind": "token", "public": public, "secret": { "token": "canary" } })
    }

    fn get<'a>(out: &'a Handover, name: &str) -> Option<&'a str> {
        out.set.get(name).map(Secret::expose)
    }

    fn read(out: &Handover, name: &str) -> String {
        std::fs::read_to_string(get(out, name).unwrap()).unwrap()
    }

    #[test]
    fn one_database_is_libpqs_default_and_its_password_is_in_a_file_alone() {
        let out = Handover::of(&given(&[pg("postgres/billing", "bill:ing", "u\\1", "p:w", Some("PEM"))])).unwrap();
        for (name, value) in [("PGHOST", "db.corp"), ("PGPORT", "5432"), ("PGDATABASE", "bill:ing"), ("PGUSER", "u\\1")]
        {
            assert_eq!(get(&out, name), Some(value));
        }
        assert_eq!(get(&out, "PGSSLMODE"), Some("verify-full"));
        assert_eq!(read(&out, "PGSSLROOTCERT"), "PEM");
        assert_eq!(get(&out, "COUNTERSIGN_POSTGRES_BILLING_SSLROOTCERT"), get(&out, "PGSSLROOTCERT"));
        assert_eq!(read(&out, "PGPASSFILE"), "db.corp:5432:bill\\:ing:u\\\\1:p\\:w\n");
        let mode = std::fs::metadata(get(&out, "PGPASSFILE").unwrap()).unwrap().permissions().mode();
        assert_eq!(mode & 0o7777, 0o600);
        assert!(out.set.values().all(|v| !v.expose().contains("p:w")), "in no variable");
        assert_eq!(get(&out, GRANT), Some(GrantId::from_bytes([1; 16]).to_string().as_str()));
    }

    #[test]
    fn with_several_only_what_all_agree_on_is_a_default() {
        let (a, b) = (pg("db/a", "one", "ua", "pa", Some("CA 1")), pg("db/b", "two", "ub", "pb", Some("CA 1")));
        let out = Handover::of(&given(&[a.clone(), b, token("api/n")])).unwrap();
        assert_eq!(read(&out, "PGPASSFILE"), "db.corp:5432:one:ua:pa\ndb.corp:5432:two:ub:pb\n");
        assert_eq!((get(&out, "PGHOST"), get(&out, "PGUSER"), get(&out, "PGDATABASE")), (Some("db.corp"), None, None));
        assert_eq!(read(&out, "PGSSLROOTCERT"), "CA 1");
        assert_eq!((get(&out, "COUNTERSIGN_DB_A_USER"), get(&out, "COUNTERSIGN_DB_B_USER")), (Some("ua"), Some("ub")));
        assert_eq!(get(&out, "COUNTERSIGN_API_N_TOKEN"), Some("canary"));
        assert!(!out.set.keys().any(|k| k.contains("PASSWORD")), "{:?}", out.set.keys());
        // One's CA is not trusted for the other.
        let b = pg("db/b", "two", "ub", "pb", Some("CA 2"));
        let out = Handover::of(&given(&[a, b])).unwrap();
        assert_eq!((get(&out, "PGSSLMODE"), get(&out, "PGSSLROOTCERT")), (Some("verify-full"), None));
        assert_eq!(read(&out, "COUNTERSIGN_DB_B_SSLROOTCERT"), "CA 2");
    }

    #[test]
    fn what_would_win_is_taken_away_and_said_without_values() {
        let out = Handover::of(&given(&[pg("db/a", "one", "ua", "pa", None)])).unwrap();
        let there = ["PGPASSWORD", "PGSSLROOTCERT", "PGHOST", "COUNTERSIGN_TOKEN", "PATH"];
        let words = out.in_words(|name| there.contains(&name));
        for said in ["sets PGHOST", "sets COUNTERSIGN_GRANT", "takes away PGPASSWORD", "takes away PGSSLROOTCERT"] {
            assert!(words.iter().any(|w| w == said), "{said}: {words:?}");
        }
        assert!(words.iter().any(|w| w == "takes away COUNTERSIGN_TOKEN"));
        assert!(!words.iter().any(|w| w.contains("PATH") || w == "takes away PGHOST" || w.contains("ua")), "{words:?}");
        // Without PostgreSQL, its variables are none of our business.
        let out = Handover::of(&given(&[token("api/n")])).unwrap();
        assert!(!out.scrub.contains("PGPASSWORD") && out.scrub.contains("SPIFFE_ENDPOINT_SOCKET"));
    }

    #[test]
    fn two_things_with_one_name_are_refused() {
        let refused = |all: &[Value]| Handover::of(&given(all)).err().map(|e| e.to_string()).unwrap_or_default();
        assert!(refused(&[token("api/a-b"), token("api/a_b")]).contains("COUNTERSIGN_API_A_B_"));
        // The child would take it for an identity.
        let svid = json!({ "resource": "svid", "kind": "x509", "public": { "cert": "c" }, "secret": {} });
        assert!(refused(&[svid]).contains("COUNTERSIGN_SVID_CERT"));
        assert!(refused(&[pg("db/a", "one\nx", "u", "p", None)]).contains("line break"));
        assert!(check(["api/a-b", "api/c"].into_iter()).is_ok());
        assert!(check(["api/a-b", "api/a.b"].into_iter()).unwrap_err().to_string().contains("COUNTERSIGN_API_A_B_"));
    }
}
