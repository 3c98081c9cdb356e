//! docker-compose.yml, kept true where no container engine is: its files are made as the README says, its configuration is
//! loaded from where compose mounts it, its PostgreSQL set-up runs on a real server, its ports are those of the broker.

#[path = "support/postgres.rs"]
mod postgres;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Arc;

use countersign::config::load::load;
use countersign::identity::Identities;
use countersign::identity::spiffe::Svid;
use countersign::time::{Clock as _, SystemClock};

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

fn compose() -> String {
    fs::read_to_string(root().join("docker-compose.yml")).unwrap()
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        let to = to.join(path.file_name().unwrap());
        if path.is_dir() {
            copy(&path, &to);
        } else {
            fs::copy(&path, &to).unwrap();
        }
    }
}

/// What a service mounts at a path, below the folder of the checkout.
fn mounted(at: &str) -> String {
    let text = compose();
    let line = text.lines().find_map(|l| l.trim().trim_start_matches("- ").strip_suffix(&format!(":{at}:ro")));
    line.unwrap_or_else(|| panic!("nothing is mounted at {at}")).trim_start_matches("./").to_owned()
}

/// The broker's file system as compose makes it, with files from `certs/make`; `None` where openssl isn't.
struct Container(tempfile::TempDir);

impl Container {
    fn new(test: &str) -> Option<Self> {
        if Command::new("openssl").arg("version").output().is_err() {
            assert!(std::env::var_os("CI").is_none(), "{test}: openssl is not installed (run tests/peers)");
            eprintln!("SKIPPED: {test}: openssl is not installed (run tests/peers)");
            return None;
        }
        let folder = tempfile::tempdir().unwrap();
        copy(&root().join(mounted("/etc/countersign")), &folder.path().join("etc/countersign"));
        assert_eq!(mounted("/etc/certs"), "certs", "where certs/make puts its files");
        let certs = folder.path().join("etc/certs");
        fs::create_dir(&certs).unwrap();
        let made = Command::new(root().join("certs/make")).arg(&certs).output().unwrap();
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
        Some(Self(folder))
    }

    fn path(&self, inside: &str) -> PathBuf {
        self.0.path().join(inside.trim_start_matches('/'))
    }

    /// The configuration that the broker is started with.
    fn config(&self) -> PathBuf {
        let text = compose();
        let command = text.split("--config\", \"").nth(1).and_then(|rest| rest.split('"').next()).unwrap();
        self.path(command)
    }

    fn check(&self, more: &[&str]) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_countersign"));
        command.args(["config", "check", "--config"]).arg(self.config()).args(more).env_clear().output().unwrap()
    }
}

#[test]
fn its_configuration_is_fine_with_the_files_that_are_made_for_it() {
    let Some(container) = Container::new("compose") else { return };
    let checked = container.check(&[]);
    let said = String::from_utf8_lossy(&checked.stdout);
    assert!(checked.status.success() && said.contains("fine: 0 problems"), "{said}");

    // Each of the services reads what is made, too.
    for (text, prefix) in
        [(compose(), "/certs/"), (fs::read_to_string(root().join("docker/oidc/provider.mjs")).unwrap(), "read('")]
    {
        let named: Vec<String> = text
            .split(prefix)
            .skip(1)
            .map(|rest| rest.chars().take_while(|c| c.is_alphanumeric() || "-_./".contains(*c)).collect())
            .filter(|name: &String| !name.is_empty())
            .collect();
        assert!(named.len() > 2, "{named:?}");
        for name in named {
            assert!(container.path("etc/certs").join(&name).is_file(), "certs/make doesn't make {name}");
        }
    }
    // No CA's key is left behind.
    for entry in fs::read_dir(container.path("etc/certs")).unwrap() {
        let path = entry.unwrap().path();
        let text = fs::read_to_string(&path).unwrap_or_default();
        let own = ["broker", "oidc", "postgres", "agent"].map(|n| format!("{n}-key.pem"));
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        assert!(own.contains(&name) || !text.contains("PRIVATE KEY"), "{name}");
    }
}

#[tokio::test]
async fn its_agent_is_who_the_broker_believes() {
    let Some(container) = Container::new("compose") else { return };
    let loaded = load(&container.config()).unwrap();
    let clock = Arc::new(SystemClock);
    let identities = Identities::new(loaded.config.spiffe.as_ref(), &[], &loaded.base, clock.clone()).unwrap();
    let certs = container.path("etc/certs");
    let svid = Svid::from_pem_files(&certs.join("agent.pem"), &certs.join("agent-key.pem")).unwrap();
    identities.start(&tokio_util::sync::CancellationToken::new());
    let mut known = identities.authenticate_certificate(&svid.chain, clock.wall());
    postgres::until("the bundle is read", async || {
        known = identities.authenticate_certificate(&svid.chain, clock.wall());
        known.is_ok()
    })
    .await;
    let agent = known.unwrap();
    assert_eq!(agent.id.as_str(), "spiffe://compose.example/agent/demo");
    assert!(loaded.config.agent.iter().any(|a| a.matches(&agent.id)), "somebody answers for it");
}

#[test]
fn its_ports_and_people_are_those_of_the_configuration() {
    let Some(container) = Container::new("compose") else { return };
    let (text, config) = (compose(), load(&container.config()).unwrap().config);
    let broker = text.split("\n  broker:\n").nth(1).unwrap().split("\n\n").next().unwrap();
    let published: Vec<u16> =
        broker.split("\"127.0.0.1:").skip(1).map(|p| p.split([':', '"']).next().unwrap().parse().unwrap()).collect();
    let listen = &config.listen;
    let mut listening = vec![listen.agent.port(), listen.agent_mtls.unwrap().port(), listen.reviewer.port()];
    listening.sort_unstable();
    assert_eq!(published, listening);
    for port in listening {
        assert!(broker.contains(&format!("\"127.0.0.1:{port}:{port}\"")), "{port} is published as another");
    }
    assert!(config.broker.issuer.ends_with(&format!(":{}", listen.agent.port())));
    assert!(config.broker.reviewer_url.ends_with(&format!(":{}", listen.reviewer.port())));
    assert!(text.contains(&format!("REDIRECT_URI: {}/login/callback\n", config.broker.reviewer_url)));
    let login = config.reviewer_login.unwrap();
    assert!(text.contains(&format!("ISSUER: {}\n", login.issuer)));
    let accounts: Vec<_> = config.person.iter().flat_map(|p| &p.identities).collect();
    assert!(accounts.len() > 2 && accounts.iter().all(|i| i.issuer == login.issuer));
    assert!(
        text.contains(&format!("broker-data:{}\n", config.broker.data_dir.display())),
        "the data is kept in a volume"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn its_postgresql_is_all_that_the_catalogue_asks_for() {
    let Some(container) = Container::new("compose") else { return };
    if !postgres::available("compose") {
        return;
    }
    let mut settings = postgres::THROW_AWAY.to_vec();
    settings.push(("max_prepared_transactions", "0"));
    assert!(compose().contains("-c max_prepared_transactions=0"));
    let cluster = tokio::task::spawn_blocking(move || postgres::Cluster::start(&settings)).await.unwrap();
    let script = mounted("/docker-entrypoint-initdb.d/countersign.sh");
    let set_up = Command::new(root().join(script))
        .env("SQL", root().join(mounted("/sql")))
        .env("BROKER_PASSWORD_FILE", container.path("etc/certs/secrets/postgres-broker"))
        .env("PGHOST", cluster.sockets())
        .env("PGPORT", cluster.port.to_string())
        .output()
        .unwrap();
    assert!(set_up.status.success(), "{}", String::from_utf8_lossy(&set_up.stderr));

    // Here it is reached on loopback, without TLS; the rest is as it is shipped.
    let catalogue = container.config().with_file_name("catalogue.toml");
    let text = fs::read_to_string(&catalogue).unwrap();
    let here = text
        .replace("host = \"postgres\"", &format!("host = \"127.0.0.1\"\nport = {}", cluster.port))
        .replace("ca_file = \"../../certs/ca.pem\"", "sslmode = \"disable\"");
    assert!(here.contains("sslmode") && here.contains("port = "));
    fs::write(&catalogue, here).unwrap();
    let checked = container.check(&["--live"]);
    let said = String::from_utf8_lossy(&checked.stdout);
    assert!(checked.status.success() && said.contains("target db: 1 gap\n"), "{said}");
    assert!(
        said.contains("should be closed  the broker's login has CREATEROLE"),
        "the simple set-up, and no more: {said}"
    );
    assert!(!said.contains("warning  policies"), "every rule is about something that can be asked for: {said}");
}

#[test]
fn the_image_believes_public_certificates() {
    // Without them no public issuer's keys could be fetched: the broker verifies with the system's store.
    let dockerfile = fs::read_to_string(root().join("Dockerfile")).unwrap();
    let last = dockerfile.rsplit("\nFROM ").next().unwrap();
    assert!(
        last.starts_with("debian:") && last.contains("install -y --no-install-recommends ca-certificates"),
        "{last}"
    );
}

#[test]
fn what_the_example_names_below_certs_is_named_as_certs_readme_says() {
    let readme = fs::read_to_string(root().join("certs/README.md")).unwrap();
    let mut named = Vec::new();
    for file in ["countersign.toml", "catalogue.toml", "compose/countersign.toml", "compose/catalogue.toml"] {
        let text = fs::read_to_string(root().join("config").join(file)).unwrap();
        let names = text.split("/certs/").skip(1).map(|rest| rest.split('"').next().unwrap().to_owned());
        named.extend(names.filter(|n| !n.contains(' ')));
    }
    assert!(named.len() > 10, "{named:?}");
    for name in named {
        let shape = [("bundles/", "bundles/<trust domain>.pem"), ("secrets/", "secrets/<name>")];
        let ends = [("-ca.pem", "<name>-ca.pem"), (".jwks.json", "<name>.jwks.json")];
        let shape = shape
            .iter()
            .find(|(start, _)| name.starts_with(start))
            .or_else(|| ends.iter().find(|(end, _)| name.ends_with(end)));
        let shape = shape.map_or(name.as_str(), |(_, shape)| shape);
        assert!(readme.contains(&format!("`{shape}`")), "certs/README.md knows no {name}");
    }
}

/// What is wrong with the form of a compose file, line by line: no engine can be assumed where this is checked.
fn wrong_compose(text: &str) -> Vec<String> {
    let mut wrong = Vec::new();
    for line in text.lines().map(|l| l.split(" #").next().unwrap_or(l)) {
        let value = line.trim().trim_start_matches("- ");
        if let Some(image) = value.strip_prefix("image:") {
            let (_, tag) = image.trim().rsplit_once(':').unwrap_or((image, "latest"));
            if tag == "latest" || tag.contains('/') {
                wrong.push(format!("{} has no fixed version", image.trim()));
            }
        }
        // A published port: "host:container", with digits at both ends.
        for quoted in line.split('"').skip(1).step_by(2) {
            let port = |p: &str| !p.is_empty() && p.bytes().all(|b| b.is_ascii_digit());
            let mut parts = quoted.rsplitn(3, ':');
            let published = parts.next().is_some_and(port) && parts.next().is_some_and(port);
            if published && !quoted.starts_with("127.0.0.1:") && !value.starts_with("user:") {
                wrong.push(format!("{quoted} is published to the whole network"));
            }
        }
        if let Some(file) = value.strip_prefix("dockerfile:")
            && !root().join(file.trim()).is_file()
        {
            wrong.push(format!("{} isn't there", file.trim()));
        }
        if line.contains('\t') {
            wrong.push("YAML takes no tabs".to_owned());
        }
    }
    for service in ["broker", "postgres", "oidc"] {
        if !text.contains(&format!("\n  {service}:\n")) {
            wrong.push(format!("{service} is missing"));
        }
    }
    wrong
}

#[test]
fn the_compose_file_pins_its_images_and_publishes_to_loopback_alone() {
    let text = fs::read_to_string(root().join("docker-compose.yml")).unwrap();
    assert_eq!(wrong_compose(&text), Vec::<String>::new());
    for (find, replace) in [
        ("postgres:15-bookworm", "postgres"),
        ("postgres:15-bookworm", "postgres:latest"),
        ("127.0.0.1:8443:8443", "8443:8443"),
        ("127.0.0.1:5432:5432", "0.0.0.0:5432:5432"),
        ("docker/oidc/Dockerfile", "docker/Dockerfile"),
        ("\n  oidc:\n", "\n  other:\n"),
    ] {
        let spoilt = text.replace(find, replace);
        assert_ne!(spoilt, text, "{find}");
        assert_eq!(wrong_compose(&spoilt).len(), 1, "{find} -> {replace}");
    }
}
