//! A throw-away PostgreSQL: its own folder, a free loopback port, an unprivileged user, stopped by pid on drop.
//! Self-contained: `#[path = "support/postgres.rs"] mod postgres;`. Needs tokio-postgres, tempfile and rustix.
#![allow(dead_code)] // each test binary uses what it needs

use std::io::Write;
use std::net::TcpListener;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Arc, Mutex, Weak};
use std::time::{Duration, Instant};

use tokio_postgres::{Client, Config, NoTls};

/// Settings for data that nobody will miss.
pub const THROW_AWAY: &[(&str, &str)] =
    &[("fsync", "off"), ("full_page_writes", "off"), ("max_wal_size", "512MB"), ("shared_buffers", "32MB")];

/// How long a server may take to start or stop.
const START: Duration = Duration::from_mins(1);

/// One running server.
pub struct Cluster {
    folder: tempfile::TempDir,
    bin: PathBuf,
    /// The loopback port; also the name of the Unix socket.
    pub port: u16,
    user: Option<(u32, u32)>,
    child: Mutex<Option<Child>>,
}

/// The folder of `initdb` and `postgres`: `$PG_BIN`, Debian's, or one on the PATH.
pub fn binaries() -> Option<PathBuf> {
    let mut folders: Vec<PathBuf> = std::env::var_os("PG_BIN").map(PathBuf::from).into_iter().collect();
    if let Ok(versions) = std::fs::read_dir("/usr/lib/postgresql") {
        let mut debian: Vec<PathBuf> = versions.filter_map(|v| Some(v.ok()?.path().join("bin"))).collect();
        debian.sort();
        folders.extend(debian.into_iter().rev());
    }
    folders.extend(std::env::split_paths(&std::env::var_os("PATH").unwrap_or_default()));
    folders.into_iter().find(|f| f.join("initdb").is_file() && f.join("postgres").is_file())
}

/// False, with a line that names the test, where PostgreSQL isn't installed. Under `CI=true` that is a failure.
pub fn available(test: &str) -> bool {
    if binaries().is_some() {
        return true;
    }
    assert!(
        std::env::var("CI").as_deref() != Ok("true"),
        "{test}: PostgreSQL's binaries are missing (run tests/peers)"
    );
    eprintln!("skipped: {test}: PostgreSQL's binaries are missing (run tests/peers)");
    false
}

/// A server for all tests of this binary that run at once; the last one to drop it stops it.
pub fn shared() -> Arc<Cluster> {
    static SHARED: Mutex<Weak<Cluster>> = Mutex::new(Weak::new());
    let mut shared = SHARED.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    shared.upgrade().unwrap_or_else(|| {
        let mut settings = THROW_AWAY.to_vec();
        settings.push(("max_connections", "200"));
        let cluster = Arc::new(Cluster::start(&settings));
        *shared = Arc::downgrade(&cluster);
        cluster
    })
}

impl Cluster {
    /// Makes a cluster with these settings beside its own, and waits until it answers.
    pub fn start(settings: &[(&str, &str)]) -> Self {
        let cluster = Self::empty();
        let data = cluster.data();
        let made = cluster
            .command("initdb")
            .args(["--no-sync", "--auth=trust", "--username=postgres", "--encoding=UTF8", "--locale=C", "-D"])
            .arg(&data)
            .output()
            .expect("initdb starts");
        assert!(made.status.success(), "initdb: {}", String::from_utf8_lossy(&made.stderr));
        // The superuser comes by the Unix socket, everybody else by password, as in the real world.
        let rules = "local all postgres trust\nlocal replication postgres trust\nlocal all all scram-sha-256\n\
                     host all postgres 127.0.0.1/32 reject\nhost all all 127.0.0.1/32 scram-sha-256\n";
        std::fs::write(data.join("pg_hba.conf"), rules).expect("pg_hba.conf is written");
        cluster.run(settings);
        cluster
    }

    /// A hot standby of this one.
    pub fn standby(&self, settings: &[(&str, &str)]) -> Self {
        let standby = Self::empty();
        let copied = standby
            .command("pg_basebackup")
            .args([
                "--no-sync",
                "-X",
                "stream",
                "-c",
                "fast",
                "-R",
                "-U",
                "postgres",
                "-p",
                &self.port.to_string(),
                "-h",
            ])
            .arg(self.sockets())
            .arg("-D")
            .arg(standby.data())
            .output()
            .expect("pg_basebackup starts");
        assert!(copied.status.success(), "pg_basebackup: {}", String::from_utf8_lossy(&copied.stderr));
        standby.run(settings);
        standby
    }

    /// Makes this standby a primary, and waits until it is one.
    pub fn promote(&self) {
        let promoted =
            self.command("pg_ctl").args(["promote", "-w", "-D"]).arg(self.data()).output().expect("pg_ctl starts");
        assert!(
            promoted.status.success(),
            "pg_ctl promote: {}\n{}",
            String::from_utf8_lossy(&promoted.stderr),
            self.log()
        );
    }

    fn empty() -> Self {
        let bin = binaries().expect("PostgreSQL's binaries are installed (run tests/peers)");
        let folder = tempfile::Builder::new().prefix("cs-pg-").tempdir_in("/tmp").expect("a folder in /tmp");
        let user = rustix::process::geteuid().is_root().then(unprivileged);
        let cluster = Self { folder, bin, port: free_port(), user, child: Mutex::new(None) };
        for path in [cluster.folder.path(), &cluster.sockets()] {
            std::fs::create_dir_all(path).expect("the cluster's folder");
            if let Some((uid, gid)) = user {
                std::os::unix::fs::chown(path, Some(uid), Some(gid)).expect("the cluster's folder is its user's");
            }
        }
        cluster
    }

    /// Starts (again) on the same port.
    pub fn run(&self, settings: &[(&str, &str)]) {
        let log = std::fs::File::options().create(true).append(true).open(self.log_file()).expect("the log file");
        let mut command = self.command("postgres");
        command.arg("-D").arg(self.data());
        let sockets = self.sockets().display().to_string();
        let port = self.port.to_string();
        let own = [("listen_addresses", "127.0.0.1"), ("port", &port), ("unix_socket_directories", &sockets)];
        for (name, value) in settings.iter().chain(&own) {
            command.arg("-c").arg(format!("{name}={value}"));
        }
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        *self.child.lock().unwrap() = Some(command.spawn().expect("postgres starts"));
        let deadline = Instant::now() + START;
        // The eighth line of postmaster.pid says when it answers.
        while std::fs::read_to_string(self.data().join("postmaster.pid"))
            .is_ok_and(|text| text.lines().nth(7).is_some_and(|line| line.trim() == "ready"))
            .eq(&false)
        {
            let ended = self.child.lock().unwrap().as_mut().is_some_and(|c| c.try_wait().is_ok_and(|s| s.is_some()));
            assert!(!ended && Instant::now() < deadline, "PostgreSQL did not start:\n{}", self.log());
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Gives it a certificate and key (PEM), for `ssl = on` at the next start.
    pub fn secure(&self, certificate: &str, key: &str) {
        for (name, text) in [("server.crt", certificate), ("server.key", key)] {
            let path = self.data().join(name);
            std::fs::write(&path, text).expect("its certificate");
            std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o600)).expect("private");
            if let Some((uid, gid)) = self.user {
                std::os::unix::fs::chown(&path, Some(uid), Some(gid)).expect("its user's");
            }
        }
    }

    /// Stops it at once, as a crash would.
    pub fn stop(&self) {
        self.end(rustix::process::Signal::QUIT);
    }

    fn end(&self, signal: rustix::process::Signal) {
        let Some(mut child) = self.child.lock().unwrap_or_else(std::sync::PoisonError::into_inner).take() else {
            return;
        };
        if let Some(pid) = i32::try_from(child.id()).ok().and_then(rustix::process::Pid::from_raw) {
            let _ = rustix::process::kill_process(pid, signal);
        }
        let deadline = Instant::now() + START;
        while matches!(child.try_wait(), Ok(None)) {
            if Instant::now() > deadline {
                let _ = child.kill();
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(self.bin.join(program));
        if let Some((uid, gid)) = self.user {
            command.uid(uid).gid(gid);
        }
        command.current_dir("/").env_clear().env("PATH", "/usr/bin:/bin").env("LC_ALL", "C");
        command
    }

    fn data(&self) -> PathBuf {
        self.folder.path().join("data")
    }

    /// The folder of its Unix socket.
    pub fn sockets(&self) -> PathBuf {
        self.folder.path().join("s")
    }

    fn log_file(&self) -> PathBuf {
        self.folder.path().join("log")
    }

    /// Everything it logged.
    pub fn log(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(self.log_file()).unwrap_or_default()).into_owned()
    }

    /// A superuser's session.
    pub async fn admin(&self, database: &str) -> Client {
        let mut config = Config::new();
        config.host_path(self.sockets()).port(self.port).user("postgres").dbname(database);
        connect(&config).await.expect("the superuser logs in")
    }

    /// A login by password over TCP, as an agent's tool does it.
    pub async fn login(&self, user: &str, password: &str, database: &str) -> Result<Client, tokio_postgres::Error> {
        self.login_with(user, password, database, "").await
    }

    /// The same with start-up options, for example `-c post_auth_delay=1`.
    pub async fn login_with(
        &self,
        user: &str,
        password: &str,
        database: &str,
        options: &str,
    ) -> Result<Client, tokio_postgres::Error> {
        let mut config = Config::new();
        config.host("127.0.0.1").port(self.port).user(user).password(password).dbname(database).options(options);
        connect(&config).await
    }

    /// A psql of the superuser: `-v` variables, then a file or a text on its standard input.
    pub fn psql(&self, database: &str, variables: &[(&str, &str)], sql: &str) -> Output {
        let mut command = Command::new(self.bin.join("psql"));
        command.args([
            "-X",
            "-q",
            "-v",
            "ON_ERROR_STOP=1",
            "-U",
            "postgres",
            "-d",
            database,
            "-p",
            &self.port.to_string(),
            "-h",
        ]);
        command.arg(self.sockets());
        for (name, value) in variables {
            command.arg("-v").arg(format!("{name}={value}"));
        }
        let mut child =
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("psql starts");
        child.stdin.take().expect("a pipe").write_all(sql.as_bytes()).expect("psql reads");
        child.wait_with_output().expect("psql ends")
    }

    /// A psql as an agent runs it, with its password in the environment; standard input is a pipe.
    pub fn agent_psql(&self, user: &str, password: &str, database: &str) -> Child {
        Command::new(self.bin.join("psql"))
            .args(["-X", "-q", "-A", "-t", "-h", "127.0.0.1", "-p", &self.port.to_string(), "-U", user, "-d", database])
            .env("PGPASSWORD", password)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("psql starts")
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        self.stop();
    }
}

async fn connect(config: &Config) -> Result<Client, tokio_postgres::Error> {
    let (client, connection) = config.connect(NoTls).await?;
    tokio::spawn(connection);
    Ok(client)
}

fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a loopback port");
    listener.local_addr().expect("its address").port()
}

/// PostgreSQL refuses to run as root: Debian's `postgres`, or `nobody`.
fn unprivileged() -> (u32, u32) {
    let accounts = std::fs::read_to_string(Path::new("/etc/passwd")).unwrap_or_default();
    for name in ["postgres", "nobody"] {
        let ids = accounts.lines().find_map(|line| {
            let mut parts = line.split(':');
            (parts.next()? == name).then_some(())?;
            Some((parts.nth(1)?.parse().ok()?, parts.next()?.parse().ok()?))
        });
        if let Some(ids) = ids {
            return ids;
        }
    }
    (65534, 65534)
}

/// Waits for a condition; panics with `what` when the deadline passes.
pub async fn until<F: AsyncFnMut() -> bool>(what: &str, mut condition: F) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !condition().await {
        assert!(Instant::now() < deadline, "waited in vain until {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}
