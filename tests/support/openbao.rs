//! A throw-away OpenBao (raft storage on real files), and a throw-away PostgreSQL for its database engine.
//!
//! `bao` comes from `COUNTERSIGN_BAO`, or from the peers' cache folder. Start them on the test's own thread: they are
//! told to die with it. Stopped by pid on drop.
#![allow(dead_code)] // each test file uses a part

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

/// How long a peer may take to start.
const START_DEADLINE: Duration = Duration::from_mins(1);

/// Where `bao` is, if it can be had here. Under `CI=true` a missing peer is a failure.
pub fn bao_binary(test: &str) -> Option<PathBuf> {
    let cache = || {
        let home = std::env::var("HOME").unwrap_or_default();
        std::env::var("COUNTERSIGN_PEERS").unwrap_or_else(|_| format!("{home}/.cache/countersign/peers"))
    };
    let path =
        std::env::var("COUNTERSIGN_BAO").map_or_else(|_| PathBuf::from(cache()).join("openbao/bin/bao"), PathBuf::from);
    if path.is_file() {
        return Some(path);
    }
    assert_ne!(std::env::var("CI").as_deref(), Ok("true"), "{test}: no bao at {}; run tests/peers", path.display());
    eprintln!("SKIPPED {test}: no bao at {}; run tests/peers", path.display());
    None
}

/// A free loopback port.
pub fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// A block of docs/vault.md, by the words after its opening fence: what the tests set up is what the page says.
pub fn doc(fence: &str) -> String {
    let text = include_str!("../../docs/vault.md");
    let start = text.find(&format!("```{fence}\n")).unwrap_or_else(|| panic!("docs/vault.md has no block {fence}"));
    let body = &text[start + fence.len() + 4..];
    body[..body.find("\n```").unwrap()].to_owned()
}

/// One OpenBao server.
pub struct OpenBao {
    binary: PathBuf,
    dir: tempfile::TempDir,
    child: Option<Child>,
    port: u16,
    scheme: &'static str,
    unseal_key: String,
    /// The root token.
    pub root: String,
    /// Where `call` and everything built on it works; the root if none.
    pub namespace: Option<String>,
    http: reqwest::Client,
}

impl OpenBao {
    /// Starts, initialises and unseals one, if there is a `bao`. `max_request_secs`: the server's
    /// `default_max_request_duration`.
    pub async fn start(test: &str, max_request_secs: u64) -> Option<Self> {
        Self::start_with(test, max_request_secs, None).await
    }

    /// The same, with TLS by this CA's certificate for 127.0.0.1: (CA, certificate, key), all PEM.
    pub async fn start_with(test: &str, max_request_secs: u64, tls: Option<(&str, &str, &str)>) -> Option<Self> {
        let binary = bao_binary(test)?;
        let dir = tempfile::tempdir().unwrap();
        // Held until both are chosen: they are two.
        let held = [(); 2].map(|()| TcpListener::bind("127.0.0.1:0").unwrap());
        let [port, cluster] = held.map(|listener| listener.local_addr().unwrap().port());
        let data = dir.path().join("data");
        std::fs::create_dir(&data).unwrap();
        let mut client = reqwest::Client::builder().no_proxy();
        let listener = match tls {
            None => "tls_disable = true".to_owned(),
            Some((ca, certificate, key)) => {
                client = client.tls_certs_only([reqwest::Certificate::from_pem(ca.as_bytes()).unwrap()]);
                let at = |name: &str, text: &str| {
                    let path = dir.path().join(name);
                    std::fs::write(&path, text).unwrap();
                    path.display().to_string()
                };
                format!("tls_cert_file = \"{}\" tls_key_file = \"{}\"", at("cert.pem", certificate), at("key.pem", key))
            }
        };
        let scheme = if tls.is_some() { "https" } else { "http" };
        let config = format!(
            "storage \"raft\" {{ path = \"{}\" node_id = \"n\" }}\n\
             listener \"tcp\" {{ address = \"127.0.0.1:{port}\" {listener} }}\n\
             api_addr = \"{scheme}://127.0.0.1:{port}\"\ncluster_addr = \"https://127.0.0.1:{cluster}\"\n\
             default_max_request_duration = \"{max_request_secs}s\"\nraw_storage_endpoint = true\n",
            data.display()
        );
        std::fs::write(dir.path().join("bao.hcl"), config).unwrap();
        let http = client.build().unwrap();
        let mut bao = Self {
            binary,
            dir,
            child: None,
            port,
            scheme,
            unseal_key: String::new(),
            root: String::new(),
            namespace: None,
            http,
        };
        bao.spawn();
        let init = bao.until("sys/init", |status, _| status == 200, || ("GET", "sys/init")).await;
        assert_eq!(init["initialized"], false);
        let (status, keys) = bao.call("PUT", "sys/init", json!({ "secret_shares": 1, "secret_threshold": 1 })).await;
        assert_eq!(status, 200, "{keys}");
        bao.unseal_key = keys["keys_base64"][0].as_str().unwrap().to_owned();
        bao.root = keys["root_token"].as_str().unwrap().to_owned();
        bao.unseal().await;
        Some(bao)
    }

    fn spawn(&mut self) {
        let log = std::fs::OpenOptions::new().create(true).append(true).open(self.dir.path().join("bao.log")).unwrap();
        let mut command = Command::new("setpriv");
        command
            .args(["--pdeathsig", "KILL", "--"])
            .arg(&self.binary)
            .arg("server")
            .arg("-config")
            .arg(self.dir.path().join("bao.hcl"));
        command.stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log);
        self.child = Some(command.spawn().expect("setpriv (util-linux) starts bao"));
    }

    /// Its log, for a failing test.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.dir.path().join("bao.log")).unwrap_or_default()
    }

    /// `http://127.0.0.1:PORT`, or https.
    pub fn address(&self) -> String {
        format!("{}://127.0.0.1:{}", self.scheme, self.port)
    }

    /// The port.
    pub const fn port(&self) -> u16 {
        self.port
    }

    /// A call as root.
    pub async fn call(&self, method: &str, path: &str, body: Value) -> (u16, Value) {
        self.call_as(&self.root, self.namespace.as_deref(), method, path, body).await
    }

    /// A call by that token, in that namespace. An unreachable server is status 0.
    pub async fn call_as(&self, token: &str, ns: Option<&str>, method: &str, path: &str, body: Value) -> (u16, Value) {
        let method = reqwest::Method::from_bytes(method.as_bytes()).unwrap();
        let mut request =
            self.http.request(method, format!("{}/v1/{path}", self.address())).timeout(Duration::from_mins(1));
        if !token.is_empty() {
            request = request.header("X-Vault-Token", token);
        }
        if let Some(ns) = ns {
            request = request.header("X-Vault-Namespace", ns);
        }
        if !body.is_null() {
            request = request.json(&body);
        }
        match request.send().await {
            Ok(response) => (response.status().as_u16(), response.json().await.unwrap_or(Value::Null)),
            Err(_) => (0, Value::Null),
        }
    }

    /// A call as root that must succeed.
    pub async fn ok(&self, method: &str, path: &str, body: Value) -> Value {
        let (status, answer) = self.call(method, path, body).await;
        assert!(matches!(status, 200 | 204), "{method} {path}: {status} {answer}");
        answer
    }

    async fn until(
        &self,
        what: &str,
        good: impl Fn(u16, &Value) -> bool,
        ask: impl Fn() -> (&'static str, &'static str),
    ) -> Value {
        let start = Instant::now();
        loop {
            let (method, path) = ask();
            let (status, answer) = self.call(method, path, Value::Null).await;
            if good(status, &answer) {
                return answer;
            }
            assert!(start.elapsed() < START_DEADLINE, "{what}: {status} {answer}\n{}", self.log());
            tokio::time::sleep(Duration::from_millis(25)).await;
        }
    }

    /// Unseals, and waits until it serves.
    pub async fn unseal(&self) {
        self.until("listening", |status, _| status == 200, || ("GET", "sys/seal-status")).await;
        self.ok("PUT", "sys/unseal", json!({ "key": self.unseal_key })).await;
        self.until("active", |status, _| status == 200, || ("GET", "sys/health")).await;
    }

    /// A lease is given up ("irrevocable"): what OpenBao itself writes to its storage after 5 to 12 minutes of failures, and
    /// reads when it starts.
    pub async fn give_up(&mut self, lease: &str) {
        let at = format!("sys/raw/sys/expire/id/{lease}");
        let entry = self.ok("GET", &at, Value::Null).await["data"]["value"].as_str().unwrap().to_owned();
        let mut entry: Value = serde_json::from_str(&entry).unwrap();
        entry["revokeErr"] = json!("failed to revoke entry: the test gave it up");
        self.ok("PUT", &at, json!({ "value": entry.to_string() })).await;
        self.restart().await;
    }

    /// Seals it.
    pub async fn seal(&self) {
        self.ok("PUT", "sys/seal", Value::Null).await;
    }

    /// Kills it (SIGKILL) and waits until it is gone.
    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// Starts it again on the same data, unsealed.
    pub async fn restart(&mut self) {
        self.kill();
        self.spawn();
        self.unseal().await;
    }

    /// The policies and log-in of docs/vault.md, with this public key; `extra_mint` and `extra_janitor` are added.
    pub async fn log_in_by(&self, pem: &str, issuer: &str, extra_mint: &str, extra_janitor: &str) {
        let keys = json!({ "jwt_validation_pubkeys": [pem] });
        self.log_in_with(keys, issuer, extra_mint, extra_janitor).await;
    }

    /// The same for a broker at `base`, whose keys are fetched from it as docs/vault.md writes it.
    pub async fn log_in_by_broker(&self, base: &str, ca: &Path, extra_mint: &str) {
        let at = |name: &str| {
            let text = include_str!("../../docs/vault.md");
            let rest = text.split(&format!("{name}=https://broker.corp:8443")).nth(1).unwrap();
            format!("{base}{}", rest.split_whitespace().next().unwrap())
        };
        let keys = json!({ "jwks_url": at("jwks_url"), "jwks_ca_pem": std::fs::read_to_string(ca).unwrap() });
        self.log_in_with(keys, &at("bound_issuer"), extra_mint, "").await;
    }

    async fn log_in_with(&self, keys: Value, issuer: &str, extra_mint: &str, extra_janitor: &str) {
        for (name, text) in [("mint", doc("hcl mint") + extra_mint), ("janitor", doc("hcl janitor") + extra_janitor)] {
            self.ok("PUT", &format!("sys/policies/acl/countersign-{name}"), json!({ "policy": text })).await;
        }
        self.ok("POST", "sys/auth/jwt", json!({ "type": "jwt" })).await;
        let mut config = json!({ "bound_issuer": issuer, "jwt_supported_algs": ["ES256", "EdDSA"] });
        config.as_object_mut().unwrap().extend(keys.as_object().unwrap().clone());
        self.ok("PUT", "auth/jwt/config", config).await;
        self.log_in_again().await;
    }

    /// Both roles of the log-in anew, as docs/vault.md writes them.
    pub async fn log_in_again(&self) {
        for (role, body) in doc_roles() {
            let path = format!("auth/jwt/role/{role}");
            self.ok("DELETE", &path, Value::Null).await;
            self.ok("PUT", &path, body).await;
        }
    }

    /// The database engine on `db`, with a role by the statements of docs/vault.md.
    pub async fn database(&self, db: &Postgres, role: &str, ttl_secs: u64, prefix: &str) {
        let (status, _) = self.call("GET", "sys/mounts/database/tune", Value::Null).await;
        if status != 200 {
            self.ok("POST", "sys/mounts/database", json!({ "type": "database" })).await;
        }
        let connection = json!({
            "plugin_name": "postgresql-database-plugin", "allowed_roles": [role], "username": "vault", "password": "vault",
            "connection_url": format!("postgresql://{{{{username}}}}:{{{{password}}}}@127.0.0.1:{}/postgres?sslmode=disable", db.port),
            "username_template": format!("{prefix}{{{{random 20 | lowercase}}}}"),
        });
        self.ok("PUT", &format!("database/config/{role}"), connection).await;
        let lines = |fence: &str| doc(fence).lines().map(str::to_owned).collect::<Vec<_>>();
        self.database_role(role, ttl_secs, &lines("sql creation"), &lines("sql revocation")).await;
    }

    /// A database role by these statements.
    pub async fn database_role(&self, role: &str, ttl_secs: u64, creation: &[String], revocation: &[String]) {
        let body = json!({
            "db_name": role, "default_ttl": ttl_secs, "max_ttl": ttl_secs,
            "creation_statements": creation, "revocation_statements": revocation,
        });
        self.ok("PUT", &format!("database/roles/{role}"), body).await;
    }

    /// A CA at `pki/`, with these roles.
    pub async fn pki(&self, roles: &[(&str, Value)]) {
        self.ok("POST", "sys/mounts/pki", json!({ "type": "pki" })).await;
        self.ok("PUT", "pki/root/generate/internal", json!({ "common_name": "test CA", "key_type": "ec" })).await;
        for (role, more) in roles {
            let mut body = json!({ "allowed_domains": ["svc.test"], "allow_subdomains": true, "key_type": "ec", "key_bits": 256, "max_ttl": "1h" });
            body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            self.ok("PUT", &format!("pki/roles/{role}"), body).await;
        }
    }

    /// A signer at `ssh/`, with role `ops` for these users.
    pub async fn ssh(&self, allowed_users: &str) {
        self.ok("POST", "sys/mounts/ssh", json!({ "type": "ssh" })).await;
        self.ok("PUT", "ssh/config/ca", json!({ "generate_signing_key": true, "key_type": "ed25519" })).await;
        let body = json!({
            "key_type": "ca", "allow_user_certificates": true, "allowed_users": allowed_users, "allow_user_key_ids": true,
            "allowed_extensions": "permit-pty", "ttl": "10m", "max_ttl": "1h",
        });
        self.ok("PUT", "ssh/roles/ops", body).await;
    }

    /// The lease ids under a path, without the path.
    pub async fn leases(&self, path: &str) -> Vec<String> {
        let (status, answer) = self.call("LIST", &format!("sys/leases/lookup/{path}"), Value::Null).await;
        match status {
            404 => Vec::new(),
            200 => answer["data"]["keys"].as_array().unwrap().iter().map(|k| k.as_str().unwrap().to_owned()).collect(),
            _ => panic!("LIST {path}: {status} {answer}"),
        }
    }

    /// True if a look-up of the lease answers 200.
    pub async fn is_lease(&self, id: &str) -> bool {
        self.call("PUT", "sys/leases/lookup", json!({ "lease_id": id })).await.0 == 200
    }
}

impl Drop for OpenBao {
    fn drop(&mut self) {
        self.kill();
    }
}

/// The roles of the log-in, as docs/vault.md writes them.
pub fn doc_roles() -> Vec<(String, Value)> {
    let text = include_str!("../../docs/vault.md");
    let roles: Vec<_> = text
        .split("bao write auth/jwt/role/")
        .skip(1)
        .map(|part| {
            let name = part.split_whitespace().next().unwrap().to_owned();
            let (from, to) = (part.find('{').unwrap(), part.find("\nJSON").unwrap());
            (name, serde_json::from_str(&part[from..to]).expect("docs/vault.md: the role is JSON"))
        })
        .collect();
    assert_eq!(roles.len(), 2);
    roles
}

/// One PostgreSQL, with the roles `admin` (superuser), `vault` (CREATEROLE) and the group `billing_ro`.
pub struct Postgres {
    dir: tempfile::TempDir,
    child: Option<Child>,
    /// Its port on 127.0.0.1.
    pub port: u16,
}

impl Postgres {
    /// Starts one, if its binaries are here.
    pub async fn start(test: &str) -> Option<Self> {
        let Some(bin) = postgres_bin() else {
            assert_ne!(std::env::var("CI").as_deref(), Ok("true"), "{test}: no PostgreSQL; run tests/peers");
            eprintln!("SKIPPED {test}: no PostgreSQL; run tests/peers");
            return None;
        };
        let (dir, port) = (tempfile::tempdir().unwrap(), free_port());
        if rustix::process::geteuid().is_root() {
            let status = Command::new("chown").arg("postgres").arg(dir.path()).status().unwrap();
            assert!(status.success());
        }
        std::fs::write(dir.path().join("pw"), "admin").unwrap();
        let data = dir.path().join("d");
        let mut initdb = unprivileged(&bin.join("initdb"));
        initdb
            .arg("-D")
            .arg(&data)
            .args(["-U", "admin", "-A", "scram-sha-256", "--no-sync", "--pwfile"])
            .arg(dir.path().join("pw"));
        let out = initdb.output().unwrap();
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        let mut postgres = Self { dir, child: None, port };
        postgres.run().await;
        let admin = postgres.admin().await;
        admin
            .batch_execute(
                "CREATE ROLE vault LOGIN PASSWORD 'vault' CREATEROLE; GRANT pg_signal_backend TO vault; \
                 CREATE ROLE billing_ro NOLOGIN; CREATE TABLE invoices (id int); GRANT SELECT ON invoices TO billing_ro; \
                 INSERT INTO invoices VALUES (1)",
            )
            .await
            .unwrap();
        Some(postgres)
    }

    /// Starts the server on the data that is there, and waits until it answers.
    pub async fn run(&mut self) {
        let bin = postgres_bin().unwrap();
        let log = std::fs::OpenOptions::new().create(true).append(true).open(self.dir.path().join("log")).unwrap();
        let mut command = unprivileged(&bin.join("postgres"));
        command.arg("-D").arg(self.dir.path().join("d")).args(["-p", &self.port.to_string(), "-k", ""]);
        command.args(["-c", "listen_addresses=127.0.0.1", "-c", "fsync=off", "-c", "max_connections=200"]);
        command.stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log);
        self.child = Some(command.spawn().unwrap());
        let start = Instant::now();
        while self.connect("admin", "admin").await.is_err() {
            assert!(
                start.elapsed() < START_DEADLINE,
                "{}",
                std::fs::read_to_string(self.dir.path().join("log")).unwrap_or_default()
            );
            tokio::time::sleep(Duration::from_millis(25)).await;
        }
    }

    /// Stops it at once, sessions and all (SIGQUIT: `pg_ctl stop -m immediate`).
    pub fn stop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let pid = rustix::process::Pid::from_raw(i32::try_from(child.id()).unwrap()).unwrap();
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::QUIT);
            let _ = child.wait();
        }
    }

    /// Logs in.
    pub async fn connect(&self, user: &str, password: &str) -> Result<tokio_postgres::Client, tokio_postgres::Error> {
        let mut config = tokio_postgres::Config::new();
        config.host("127.0.0.1").port(self.port).user(user).password(password).dbname("postgres");
        config.connect_timeout(Duration::from_secs(5));
        let (client, connection) = config.connect(tokio_postgres::NoTls).await?;
        tokio::spawn(async move {
            let _ = connection.await;
        });
        Ok(client)
    }

    /// Logs in as superuser.
    pub async fn admin(&self) -> tokio_postgres::Client {
        self.connect("admin", "admin").await.unwrap()
    }

    /// The users whose name begins so.
    pub async fn users(&self, prefix: &str) -> Vec<String> {
        let rows = self
            .admin()
            .await
            .query("SELECT rolname FROM pg_roles WHERE starts_with(rolname::text, $1)", &[&prefix])
            .await
            .unwrap();
        rows.into_iter().map(|r| r.get(0)).collect()
    }
}

impl Drop for Postgres {
    fn drop(&mut self) {
        self.stop();
    }
}

fn postgres_bin() -> Option<PathBuf> {
    let known = (11..30).rev().map(|v| PathBuf::from(format!("/usr/lib/postgresql/{v}/bin")));
    let path = std::env::var("PATH").unwrap_or_default();
    let listed: Vec<_> = std::env::split_paths(&path).collect();
    listed.into_iter().chain(known).find(|p| p.join("initdb").is_file())
}

/// A `psql` that runs one statement: a session in a process of its own.
pub fn psql(port: u16, user: &str, password: &str, sql: &str) -> Child {
    // Beside the server, or where a link to the server leads.
    let initdb = postgres_bin().unwrap().join("initdb").canonicalize().unwrap();
    let program = initdb.with_file_name("psql");
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "--"]).arg(program).args(["-X", "-h", "127.0.0.1", "-p"]);
    command.arg(port.to_string()).args(["-U", user, "-d", "postgres", "-c", sql]).env("PGPASSWORD", password);
    command.stdin(Stdio::null()).stdout(Stdio::null());
    command.spawn().expect("psql starts")
}

/// PostgreSQL refuses to run as root.
fn unprivileged(program: &std::path::Path) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL"]);
    if rustix::process::geteuid().is_root() {
        command.args(["--reuid=postgres", "--regid=postgres", "--clear-groups"]);
    }
    command.arg("--").arg(program).current_dir("/");
    command
}
