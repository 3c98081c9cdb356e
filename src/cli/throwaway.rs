//! A throw-away PostgreSQL for `dev` and `tour`, where its binaries are on the machine: its own folder, loopback only,
//! as an unprivileged user when started by root, stopped by the pid with which it was started.

use std::io::Write;
use std::net::TcpListener;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use tokio_postgres::NoTls;

use crate::core::secret::Secret;
use crate::keys::random::{SystemRandom, random_secret};

use super::CliError;
use super::folder::Folder;

/// How long the server may take until it answers.
const START: Duration = Duration::from_secs(30);
/// Oldest major version in which leases can be made.
const MAJOR_MIN: u32 = 14;
/// How long it may take to stop before it is killed.
const STOP: Duration = Duration::from_secs(10);

/// What the demo has in its databases, and the hardening that leases need.
const SET_UP: &str = include_str!("../../config/dev/postgres.sql");
const HARDENING: &str = include_str!("../../config/dev/postgres-hardening.sql");

/// Since 16, CREATEROLE alone reaches no group: the broker's login gets ADMIN on each (config/postgres/10-broker-direct.sql).
const ADMIN_SINCE_16: &str = "SELECT format('GRANT %I TO countersign WITH ADMIN TRUE, INHERIT FALSE, SET FALSE', rolname) \
     FROM pg_roles WHERE NOT rolcanlogin AND NOT rolsuper AND rolname NOT LIKE 'pg\\_%' \
     AND current_setting('server_version_num')::int >= 160000";

/// A running server. Dropping it stops it and removes its folder.
pub struct ThrowAway {
    /// Its port on loopback.
    pub port: u16,
    /// The password of the broker's login there.
    pub password: Secret,
    admin: Secret,
    // Stopped before its folder goes.
    _server: Server,
    _folder: Folder,
}

/// Its first process.
struct Server(Child);

/// The folder of the newest `initdb` and `postgres` on the PATH or in Debian's place; or in words, why there is none.
pub fn binaries() -> Result<PathBuf, String> {
    let mut folders: Vec<PathBuf> = std::env::split_paths(&std::env::var_os("PATH").unwrap_or_default()).collect();
    if let Ok(versions) = std::fs::read_dir("/usr/lib/postgresql") {
        folders.extend(versions.flatten().map(|v| v.path().join("bin")));
    }
    folders.retain(|f| f.join("initdb").is_file() && f.join("postgres").is_file());
    choose(folders.into_iter().filter_map(|folder| {
        let asked = Command::new(folder.join("postgres")).arg("--version").stderr(Stdio::null()).output().ok()?;
        Some((folder, major(&String::from_utf8_lossy(&asked.stdout))?))
    }))
}

/// The major version in `postgres (PostgreSQL) 17.2 (Debian …)`, `… 9.6.24`, `… 18beta1`.
fn major(said: &str) -> Option<u32> {
    let version = said.split_once("(PostgreSQL) ")?.1;
    version.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()
}

/// The newest, if leases can be made in it.
fn choose(found: impl Iterator<Item = (PathBuf, u32)>) -> Result<PathBuf, String> {
    match found.max_by_key(|(_, major)| *major) {
        Some((folder, major)) if major >= MAJOR_MIN => Ok(folder),
        Some((_, major)) => {
            Err(format!("the PostgreSQL on this machine is version {major}, and {MAJOR_MIN} is needed"))
        }
        None => Err("PostgreSQL's binaries are not on this machine".to_owned()),
    }
}

/// PostgreSQL refuses to run as root: somebody else's ids, from the password database.
fn unprivileged() -> Result<Option<(u32, u32)>, CliError> {
    if !rustix::process::geteuid().is_root() {
        return Ok(None);
    }
    let passwd = std::fs::read_to_string("/etc/passwd").map_err(|e| CliError::said(format!("/etc/passwd: {e}")))?;
    let ids = |name: &str| {
        passwd
            .lines()
            .map(|l| l.split(':').collect::<Vec<_>>())
            .find(|f| f.first() == Some(&name))
            .and_then(|f| Some((f.get(2)?.parse().ok()?, f.get(3)?.parse().ok()?)))
    };
    ids("postgres")
        .or_else(|| ids("nobody"))
        .map(Some)
        .ok_or_else(|| CliError::said("there is no unprivileged user to run PostgreSQL as"))
}

impl ThrowAway {
    /// Makes a cluster and waits until it answers.
    pub async fn start(bin: &Path) -> Result<Self, CliError> {
        let user = unprivileged()?;
        let name = format!("countersign-pg-{}", hex::encode(crate::keys::random::random_bytes::<8>(&SystemRandom)));
        let folder = std::env::temp_dir().join(name);
        let io = |what: &'static str| move |e: std::io::Error| CliError::said(format!("PostgreSQL's {what}: {e}"));
        std::fs::DirBuilder::new().mode(0o700).create(&folder).map_err(io("folder"))?;
        let kept = Folder::new(folder.clone(), true);
        let (data, password_file) = (folder.join("data"), folder.join("password"));
        let admin = random_secret(&SystemRandom);
        let mut file = std::fs::OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&password_file)
            .map_err(io("password file"))?;
        file.write_all(admin.expose().as_bytes()).map_err(io("password file"))?;
        if let Some((uid, gid)) = user {
            for path in [&folder, &password_file] {
                chown(path, Some(uid), Some(gid)).map_err(io("folder"))?;
            }
        }
        let command = |program: &str| {
            let mut command = Command::new(bin.join(program));
            // A group of its own: Ctrl-C is for us, and the server ends when its sessions' leases have ended.
            command.current_dir(&folder).stdin(Stdio::null()).process_group(0);
            if let Some((uid, gid)) = user {
                command.uid(uid).gid(gid);
            }
            command
        };
        let made = command("initdb")
            .args(["-N", "-A", "scram-sha-256", "-U", "postgres", "-E", "UTF8", "--locale=C", "--pwfile"])
            .arg(&password_file)
            .arg("-D")
            .arg(&data)
            .output()
            .map_err(io("initdb"))?;
        if !made.status.success() {
            return Err(CliError::said(format!("initdb: {}", String::from_utf8_lossy(&made.stderr).trim())));
        }
        let _ = std::fs::remove_file(&password_file);
        let port = TcpListener::bind("127.0.0.1:0").and_then(|l| l.local_addr()).map_err(io("port"))?.port();
        let log = std::fs::File::create(folder.join("log")).map_err(io("log"))?;
        let child = command("postgres")
            .arg("-D")
            .arg(&data)
            .args(["-c", "listen_addresses=127.0.0.1", "-c", &format!("port={port}"), "-c", "unix_socket_directories="])
            .args([
                "-c",
                "fsync=off",
                "-c",
                "full_page_writes=off",
                "-c",
                "shared_buffers=32MB",
                "-c",
                "max_prepared_transactions=0",
            ])
            .stdout(log.try_clone().map_err(io("log"))?)
            .stderr(log)
            .spawn()
            .map_err(io("server"))?;
        let password = random_secret(&SystemRandom);
        let server = Self { port, password, admin, _server: Server(child), _folder: kept };
        server.set_up().await?;
        Ok(server)
    }

    /// An administrator's connection to one of its databases.
    pub async fn admin(&self, database: &str) -> Result<tokio_postgres::Client, CliError> {
        let mut config = tokio_postgres::Config::new();
        config.host("127.0.0.1").port(self.port).user("postgres").password(self.admin.expose()).dbname(database);
        let (client, connection) = config.connect(NoTls).await.map_err(CliError::said)?;
        tokio::spawn(connection);
        Ok(client)
    }

    async fn set_up(&self) -> Result<(), CliError> {
        let deadline = tokio::time::Instant::now() + START;
        let client = loop {
            match self.admin("postgres").await {
                Ok(client) => break client,
                Err(error) if tokio::time::Instant::now() > deadline => return Err(error),
                Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
            }
        };
        let failed = |e: tokio_postgres::Error| {
            let detail = e.as_db_error().map_or_else(|| e.to_string(), |d| d.message().to_owned());
            CliError::said(format!("setting up PostgreSQL: {detail}"))
        };
        // Random, base64url: no quote can be in it.
        let login = format!("CREATE ROLE countersign LOGIN CREATEROLE PASSWORD '{}'", self.password.expose());
        client.batch_execute(&login).await.map_err(failed)?;
        client.batch_execute("CREATE ROLE lease_conn NOLOGIN").await.map_err(failed)?;
        for database in ["shop", "sandbox"] {
            client.batch_execute(&format!("CREATE DATABASE {database}")).await.map_err(failed)?;
        }
        for part in SET_UP.split("\n-- database ").skip(1) {
            let (database, statements) = part.split_once('\n').unwrap_or((part, ""));
            self.admin(database.trim()).await?.batch_execute(statements).await.map_err(failed)?;
        }
        for database in ["shop", "sandbox", "postgres", "template1"] {
            self.admin(database).await?.batch_execute(HARDENING).await.map_err(failed)?;
        }
        for database in ["shop", "sandbox"] {
            client
                .batch_execute(&format!("GRANT CONNECT ON DATABASE {database} TO lease_conn"))
                .await
                .map_err(failed)?;
        }
        for grant in client.query(ADMIN_SINCE_16, &[]).await.map_err(failed)? {
            client.batch_execute(grant.get(0)).await.map_err(failed)?;
        }
        Ok(())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let pid = i32::try_from(self.0.id()).ok().and_then(rustix::process::Pid::from_raw);
        if let Some(pid) = pid {
            // Fast shutdown; it may be gone already.
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::INT);
        }
        let deadline = std::time::Instant::now() + STOP;
        while matches!(self.0.try_wait(), Ok(None)) {
            if std::time::Instant::now() > deadline {
                let _ = self.0.kill();
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_is_taken_if_it_is_new_enough() {
        for (said, version) in [
            ("postgres (PostgreSQL) 17.2 (Debian 17.2-1.pgdg120+1)\n", Some(17)),
            ("postgres (PostgreSQL) 9.6.24\n", Some(9)),
            ("postgres (PostgreSQL) 18beta1\n", Some(18)),
            ("postgres (EnterpriseDB) 15.1\n", None),
            ("", None),
        ] {
            assert_eq!(major(said), version, "{said}");
        }
        let of = |all: &[(&str, u32)]| choose(all.iter().map(|(f, v)| (PathBuf::from(f), *v)));
        assert_eq!(of(&[("9.6", 9), ("17", 17), ("15", 15)]).unwrap(), PathBuf::from("17"));
        assert_eq!(of(&[("14", MAJOR_MIN)]).unwrap(), PathBuf::from("14"));
        assert!(of(&[("9.6", 9), ("13", 13)]).unwrap_err().contains("is version 13"));
        assert!(of(&[]).unwrap_err().contains("not on this machine"));
    }
}
