//! "My certificate is my identity, for as long as its authority is believed": X.509-SVIDs over real TLS, trust bundles
//! that change under open connections (A10), the rules of a leaf, and who signs for whom (A9, A14).

#[path = "support/identity_kit.rs"]
mod kit;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;

use base64::Engine as _;
use countersign::config::SpiffeConfig;
use countersign::core::request::Confirmation;
use countersign::identity::dev_authority::DevAuthority;
use countersign::identity::mtls::{OwnSvid, mtls_server_config};
use countersign::identity::spiffe::Svid;
use countersign::identity::{Identities, IdentityError, Method, Refusal, VerifiedAgent};
use countersign::time::Clock;
use kit::{TestClock, until};
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, ExtendedKeyUsagePurpose, IsCa, KeyPair, KeyUsagePurpose,
    SanType,
};
use rustls_pki_types::CertificateDer;
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::sync::watch;
use tokio_rustls::{TlsAcceptor, TlsConnector};
use tokio_util::sync::CancellationToken;

const AGENT: &str = "spiffe://corp/agent/7";

fn config(bundles: &[&str], domains: &[&str]) -> SpiffeConfig {
    SpiffeConfig {
        workload_api: None,
        bundles: bundles.iter().map(|d| ((*d).to_owned(), format!("{d}.bundle").into())).collect::<BTreeMap<_, _>>(),
        trust_domains: domains.iter().map(|d| (*d).to_owned()).collect(),
        audience: "https://broker.example".to_owned(),
        tier_max: None,
    }
}

struct House {
    clock: Arc<TestClock>,
    identities: Arc<Identities>,
    folder: tempfile::TempDir,
    stop: CancellationToken,
}

impl Drop for House {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

impl House {
    /// Bundle files written first, then the house.
    fn new(files: &[(&str, String)], domains: &[&str]) -> Self {
        let clock = TestClock::new();
        let folder = tempfile::tempdir().unwrap();
        for (domain, text) in files {
            write(folder.path(), domain, text);
        }
        let names: Vec<&str> = files.iter().map(|(d, _)| *d).collect();
        let identities = Identities::new(Some(&config(&names, domains)), &[], folder.path(), clock.clone()).unwrap();
        let stop = CancellationToken::new();
        identities.start(&stop);
        Self { clock, identities: Arc::new(identities), folder, stop }
    }
    fn ask(&self, chain: &[CertificateDer<'_>]) -> Result<VerifiedAgent, IdentityError> {
        self.identities.authenticate_certificate(chain, self.clock.wall())
    }
    fn refusal(&self, chain: &[CertificateDer<'_>]) -> Refusal {
        self.ask(chain).unwrap_err().refusal()
    }
}

fn write(folder: &Path, domain: &str, text: &str) {
    let next = folder.join("next");
    std::fs::write(&next, text).unwrap();
    std::fs::rename(next, folder.join(format!("{domain}.bundle"))).unwrap();
}

/// A CA and leaves with whatever a test wants to be wrong with them.
struct Forge {
    ca: CertifiedIssuer<'static, KeyPair>,
    clock: Arc<TestClock>,
}

fn date(secs: u64) -> time::OffsetDateTime {
    time::OffsetDateTime::from_unix_timestamp(i64::try_from(secs).unwrap()).unwrap()
}

fn uri(text: &str) -> SanType {
    SanType::URI(text.try_into().unwrap())
}

impl Forge {
    fn new(clock: &Arc<TestClock>) -> Self {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        params.not_before = date(clock.now_secs() - 60);
        params.not_after = date(clock.now_secs() + 7200);
        let ca = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
        Self { ca, clock: Arc::clone(clock) }
    }
    fn good(&self) -> CertificateParams {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        params.not_before = date(self.clock.now_secs() - 60);
        params.not_after = date(self.clock.now_secs() + 3600);
        params.subject_alt_names = vec![uri(AGENT)];
        params
    }
    fn leaf(&self, change: impl FnOnce(&mut CertificateParams)) -> Vec<CertificateDer<'static>> {
        let mut params = self.good();
        change(&mut params);
        vec![params.signed_by(&KeyPair::generate().unwrap(), &self.ca).unwrap().der().clone()]
    }
}

#[tokio::test]
async fn an_svid_is_the_agent_that_it_names_and_binds_to_its_certificate() {
    let clock = TestClock::new();
    let authority = DevAuthority::new("corp", clock.clone()).unwrap();
    for bundle in [authority.bundle_document(), authority.x509_authorities_pem()] {
        let house = House::new(&[("corp", bundle)], &["corp"]);
        let svid = authority.x509_svid(AGENT, &[], 600).unwrap();
        let agent = house.ask(&svid.chain).unwrap();
        assert_eq!((agent.id.as_str(), agent.issuer.as_str()), (AGENT, "spiffe://corp"));
        assert_eq!(agent.method, Method::X509Svid);
        assert_eq!(agent.expires_at.secs(), clock.now_secs() + 600);
        let hash = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, &svid.chain[0]);
        let thumbprint = base64::prelude::BASE64_URL_SAFE_NO_PAD.encode(hash);
        assert_eq!(agent.confirmation, Some(Confirmation::CertificateSha256(thumbprint)));
    }
    // The bundle document brings the JWT authorities too; PEM has none.
    let house = House::new(&[("corp", authority.bundle_document())], &["corp"]);
    let jwt = authority.jwt_svid(AGENT, &["https://broker.example"], 60).unwrap();
    assert_eq!(house.identities.authenticate_bearer(&jwt, house.clock.wall()).await.unwrap().id.as_str(), AGENT);
    let house = House::new(&[("corp", authority.x509_authorities_pem())], &["corp"]);
    assert!(house.identities.authenticate_bearer(&jwt, house.clock.wall()).await.is_err());
}

#[tokio::test]
async fn a09_the_rules_of_a_leaf() {
    let clock = TestClock::new();
    let forge = Forge::new(&clock);
    let house = House::new(&[("corp", forge.ca.pem())], &["corp"]);
    house.ask(&forge.leaf(|_| {})).unwrap();
    // DNS names beside the one URI are allowed (X.509-SVID, section 2).
    house.ask(&forge.leaf(|p| p.subject_alt_names.push(SanType::DnsName("a.corp".try_into().unwrap())))).unwrap();
    house.ask(&forge.leaf(|p| p.extended_key_usages.clear())).unwrap();

    let refused = |what: &str, refusal: Refusal, change: &dyn Fn(&mut CertificateParams)| {
        let error = house.ask(&forge.leaf(change)).expect_err(what);
        assert_eq!(error.refusal(), refusal, "{what}: {error}");
    };
    refused("no SAN", Refusal::Malformed, &|p| p.subject_alt_names.clear());
    refused("two SPIFFE IDs", Refusal::Malformed, &|p| p.subject_alt_names.push(uri("spiffe://corp/agent/8")));
    refused("another URI beside it", Refusal::Malformed, &|p| p.subject_alt_names.push(uri("https://corp")));
    refused("a SPIFFE ID as DNS name or mail only", Refusal::Malformed, &|p| {
        p.subject_alt_names = vec![SanType::Rfc822Name("spiffe@corp".try_into().unwrap())];
    });
    refused("a URI that is none", Refusal::Claim, &|p| p.subject_alt_names = vec![uri("https://corp/agent/7")]);
    for other in [
        "SPIFFE://corp/agent/7",
        "spiffe://CORP/agent/7",
        "spiffe://corp/agent/7/",
        "spiffe://corp/agent/../7",
        "spiffe://corp/%61",
    ] {
        refused("a15", Refusal::Claim, &|p| p.subject_alt_names = vec![uri(other)]);
    }
    refused("no path", Refusal::Claim, &|p| p.subject_alt_names = vec![uri("spiffe://corp")]);
    refused("a CA", Refusal::Malformed, &|p| p.is_ca = IsCa::Ca(BasicConstraints::Unconstrained));
    refused("no key usage", Refusal::Malformed, &|p| p.key_usages.clear());
    refused("not for signatures", Refusal::Malformed, &|p| p.key_usages = vec![KeyUsagePurpose::KeyEncipherment]);
    refused("signs certificates", Refusal::Malformed, &|p| p.key_usages.push(KeyUsagePurpose::KeyCertSign));
    refused("signs CRLs", Refusal::Malformed, &|p| p.key_usages.push(KeyUsagePurpose::CrlSign));
    refused("for servers only", Refusal::BadSignature, &|p| {
        p.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    });
    refused("over", Refusal::Expired, &|p| p.not_after = date(clock.now_secs() - 1));
    refused("not begun", Refusal::NotYetValid, &|p| p.not_before = date(clock.now_secs() + 60));
    refused("foreign", Refusal::UnknownIssuer, &|p| p.subject_alt_names = vec![uri("spiffe://other/agent/7")]);

    assert_eq!(house.refusal(&Forge::new(&clock).leaf(|_| {})), Refusal::BadSignature, "another CA");
    let own = forge.good().self_signed(&KeyPair::generate().unwrap()).unwrap();
    assert_eq!(house.refusal(&[own.der().clone()]), Refusal::BadSignature, "self-signed");
    assert_eq!(house.refusal(&[]), Refusal::Malformed);
    assert_eq!(house.refusal(&[CertificateDer::from(b"garbage".to_vec())]), Refusal::Malformed);
    let mut trailing = forge.leaf(|_| {})[0].to_vec();
    trailing.push(0);
    assert_eq!(house.refusal(&[CertificateDer::from(trailing)]), Refusal::Malformed);
    let long: Vec<_> = (0..9).flat_map(|_| forge.leaf(|_| {})).collect();
    assert_eq!(house.refusal(&long), Refusal::Malformed, "nine certificates");
    // A leaf can't sign a leaf, and a leaf with a flipped byte is another certificate.
    let (key, mid) = (KeyPair::generate().unwrap(), forge.good());
    let mid_cert = mid.signed_by(&key, &forge.ca).unwrap();
    let below = forge.good().signed_by(&KeyPair::generate().unwrap(), &rcgen::Issuer::new(mid, key)).unwrap();
    assert_eq!(house.refusal(&[below.der().clone(), mid_cert.der().clone()]), Refusal::BadSignature);
    let good = forge.leaf(|_| {});
    house.ask(&good).unwrap();
    let mut flipped = good[0].to_vec();
    let last = flipped.len() - 1;
    flipped[last] ^= 1;
    assert!(house.ask(&[CertificateDer::from(flipped)]).is_err());
}

#[tokio::test]
async fn an_intermediate_that_the_peer_sends_is_used_and_counts_with_its_validity() {
    let clock = TestClock::new();
    let forge = Forge::new(&clock);
    let house = House::new(&[("corp", forge.ca.pem())], &["corp"]);
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    params.not_before = date(clock.now_secs() - 60);
    params.not_after = date(clock.now_secs() + 900);
    let mid = CertifiedIssuer::signed_by(params, KeyPair::generate().unwrap(), &forge.ca).unwrap();
    let leaf = forge.good().signed_by(&KeyPair::generate().unwrap(), &mid).unwrap();
    let chain = [leaf.der().clone(), mid.der().clone()];
    assert_eq!(house.ask(&chain).unwrap().expires_at.secs(), clock.now_secs() + 900);
    assert_eq!(house.refusal(&chain[..1]), Refusal::BadSignature);
    // It was verified and is remembered; when the intermediate is over, so is that.
    house.clock.advance_secs(1000);
    assert_eq!(house.refusal(&chain), Refusal::BadSignature);
}

#[tokio::test]
async fn a14_an_authority_signs_for_its_own_trust_domain_only() {
    let clock = TestClock::new();
    let (corp, other) = (Forge::new(&clock), Forge::new(&clock));
    let house = House::new(&[("corp", corp.ca.pem()), ("other", other.ca.pem())], &["corp", "other"]);
    let for_other = |p: &mut CertificateParams| p.subject_alt_names = vec![uri("spiffe://other/agent/7")];
    house.ask(&corp.leaf(|_| {})).unwrap();
    house.ask(&other.leaf(for_other)).unwrap();
    assert_eq!(house.refusal(&other.leaf(|_| {})), Refusal::BadSignature);
    assert_eq!(house.refusal(&corp.leaf(for_other)), Refusal::BadSignature);

    let (a, b) = (DevAuthority::new("a", clock.clone()).unwrap(), DevAuthority::new("b", clock.clone()).unwrap());
    // B's keys published as A's: A's tokens are refused, B's tokens don't become A's.
    let house = House::new(&[("a", b.bundle_document()), ("b", b.bundle_document())], &["a", "b"]);
    let ask = async |jwt: String| house.identities.authenticate_bearer(&jwt, house.clock.wall()).await;
    let audience = ["https://broker.example"];
    assert!(ask(a.jwt_svid("spiffe://a/x", &audience, 60).unwrap()).await.is_err());
    assert_eq!(ask(b.jwt_svid("spiffe://b/x", &audience, 60).unwrap()).await.unwrap().issuer, "spiffe://b");
}

#[tokio::test]
async fn an_authority_that_expired_signs_for_nobody() {
    let clock = TestClock::new();
    let forge = Forge::new(&clock);
    let house = House::new(&[("corp", forge.ca.pem())], &["corp"]);
    let long = forge.leaf(|p| p.not_after = date(clock.now_secs() + 86_400));
    // Accepted (and remembered) until its root ends, though the leaf goes on.
    assert_eq!(house.ask(&long).unwrap().expires_at.secs(), clock.now_secs() + 7200);
    house.clock.advance_secs(7201);
    assert_eq!(house.refusal(&long), Refusal::BadSignature);
}

#[tokio::test]
async fn bundle_files_that_cannot_be_used() {
    let clock = TestClock::new();
    let forge = Forge::new(&clock);
    let good = forge.leaf(|_| {});
    let leaf_pem = format!(
        "-----BEGIN CERTIFICATE-----\n{}\n-----END CERTIFICATE-----\n",
        base64::prelude::BASE64_STANDARD.encode(&good[0])
    );
    for bad in [
        String::new(),
        "garbage".into(),
        "{}".into(),
        r#"{"keys":[{"use":"x509-svid"}]}"#.into(),
        r#"{"keys":[{"use":"x509-svid","x5c":["%"]}]}"#.into(),
        leaf_pem,
        forge.ca.pem().repeat(33),
        format!("{{\"keys\":[],\"x\":\"{}\"}}", "y".repeat(512 * 1024)),
    ] {
        let house = House::new(&[("corp", bad.clone())], &["corp"]);
        assert_eq!(house.refusal(&good), Refusal::KeysUnavailable, "{bad:.60}");
    }
    // Entries of other uses are skipped, and a trust domain without authorities has none.
    let house = House::new(&[("corp", r#"{"keys":[{"use":"wit-svid","kty":"EC"}]}"#.into())], &["corp"]);
    assert_eq!(house.refusal(&good), Refusal::BadSignature);
    let base = tempfile::tempdir().unwrap();
    for config in
        [config(&[], &["corp"]), config(&["corp"], &[]), config(&["corp"], &["other"]), config(&["Corp"], &["Corp"])]
    {
        assert!(Identities::new(Some(&config), &[], base.path(), clock.clone()).is_err(), "{config:?}");
    }
}

/// A server that answers each line by who the peer is, asked anew: as the broker's listener does for each request.
async fn serve(house: &House, server: Svid) -> (SocketAddr, watch::Sender<Option<Arc<Svid>>>) {
    let (own, own_svid) = watch::channel(Some(Arc::new(server)));
    let verifier = Arc::clone(house.identities.spiffe().unwrap());
    let config = mtls_server_config(verifier, Arc::new(OwnSvid::new(own_svid)), house.clock.clone()).unwrap();
    let acceptor = TlsAcceptor::from(Arc::new(config));
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (identities, clock) = (Arc::clone(&house.identities), Arc::clone(&house.clock));
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let (acceptor, identities, clock) = (acceptor.clone(), Arc::clone(&identities), Arc::clone(&clock));
            tokio::spawn(async move {
                let Ok(stream) = acceptor.accept(stream).await else { return };
                let chain = stream.get_ref().1.peer_certificates().unwrap().to_vec();
                let mut stream = BufReader::new(stream);
                let mut line = String::new();
                while stream.read_line(&mut line).await.is_ok_and(|n| n > 0) {
                    let answer = match identities.authenticate_certificate(&chain, clock.wall()) {
                        Ok(agent) => format!("{}\n", agent.id),
                        Err(e) => format!("refused {:?}\n", e.refusal()),
                    };
                    stream.write_all(answer.as_bytes()).await.unwrap();
                    line.clear();
                }
            });
        }
    });
    (address, own)
}

type Connection = BufReader<tokio_rustls::client::TlsStream<tokio::net::TcpStream>>;

async fn connect(config: &Arc<rustls::ClientConfig>, address: SocketAddr) -> std::io::Result<Connection> {
    let stream = tokio::net::TcpStream::connect(address).await?;
    let stream = TlsConnector::from(Arc::clone(config)).connect("localhost".try_into().unwrap(), stream).await?;
    Ok(BufReader::new(stream))
}

async fn request(connection: &mut Connection) -> std::io::Result<String> {
    connection.write_all(b"who am I\n").await?;
    let mut line = String::new();
    match connection.read_line(&mut line).await? {
        0 => Err(std::io::ErrorKind::UnexpectedEof.into()),
        _ => Ok(line.trim().to_owned()),
    }
}

fn client(
    authority: &DevAuthority,
    svid: Option<Svid>,
    versions: &[&'static rustls::SupportedProtocolVersion],
) -> Arc<rustls::ClientConfig> {
    let mut roots = rustls::RootCertStore::empty();
    for root in authority.x509_authorities() {
        roots.add(root).unwrap();
    }
    let builder = rustls::ClientConfig::builder_with_provider(rustls::crypto::aws_lc_rs::default_provider().into())
        .with_protocol_versions(versions)
        .unwrap()
        .with_root_certificates(roots);
    Arc::new(match svid {
        Some(svid) => builder.with_client_auth_cert(svid.chain, svid.key).unwrap(),
        None => builder.with_no_client_auth(),
    })
}

const TLS13: &[&rustls::SupportedProtocolVersion] = &[&rustls::version::TLS13];

#[tokio::test]
async fn a10_a_bundle_that_changes_ends_open_connections_identities_and_resumptions() {
    let clock = TestClock::new();
    let servers = DevAuthority::new("servers", clock.clone()).unwrap();
    let corp = DevAuthority::new("corp", clock.clone()).unwrap();
    let house = House::new(&[("corp", corp.bundle_document())], &["corp"]);
    let (address, _own) =
        serve(&house, servers.x509_svid("spiffe://servers/broker", &["localhost"], 3600).unwrap()).await;
    let svid = corp.x509_svid(AGENT, &[], 3600).unwrap();
    let config = client(&servers, Some(svid), TLS13);

    let mut open = connect(&config, address).await.unwrap();
    assert_eq!(request(&mut open).await.unwrap(), AGENT);
    // The same client comes again: a session that could be resumed would be; it isn't.
    let mut again = connect(&config, address).await.unwrap();
    assert_eq!(request(&mut again).await.unwrap(), AGENT);
    assert_eq!(again.get_ref().get_ref().1.handshake_kind(), Some(rustls::HandshakeKind::Full));

    // Rotation: the old authority stays for a while, old SVIDs go on, new ones work.
    corp.rotate().unwrap();
    write(house.folder.path(), "corp", &corp.bundle_document());
    let new = client(&servers, Some(corp.x509_svid("spiffe://corp/agent/8", &[], 3600).unwrap()), TLS13);
    let with_new = async || match connect(&new, address).await {
        Ok(mut connection) => request(&mut connection).await.is_ok_and(|id| id == "spiffe://corp/agent/8"),
        Err(_) => false,
    };
    until("the new authority is believed", with_new).await;
    assert_eq!(request(&mut open).await.unwrap(), AGENT);

    // The old authority is taken out: the open connection has no identity any more, and a new one isn't made.
    corp.forget_old();
    write(house.folder.path(), "corp", &corp.bundle_document());
    until("the old authority is forgotten", async || request(&mut open).await.unwrap() == "refused BadSignature").await;
    let refused = match connect(&config, address).await {
        Ok(mut connection) => request(&mut connection).await.is_err(),
        Err(_) => true,
    };
    assert!(refused, "a resumed or new session with the old SVID");
    assert!(with_new().await);

    // The whole bundle is removed: nobody of that trust domain, at once, on open connections too.
    let mut open = connect(&new, address).await.unwrap();
    assert_eq!(request(&mut open).await.unwrap(), "spiffe://corp/agent/8");
    std::fs::remove_file(house.folder.path().join("corp.bundle")).unwrap();
    until("the bundle is gone", async || request(&mut open).await.unwrap() == "refused KeysUnavailable").await;
    assert!(!with_new().await);
}

#[tokio::test]
async fn a10_a_certificate_that_expires_under_an_open_connection() {
    let clock = TestClock::new();
    let servers = DevAuthority::new("servers", clock.clone()).unwrap();
    let corp = DevAuthority::new("corp", clock.clone()).unwrap();
    let house = House::new(&[("corp", corp.bundle_document())], &["corp"]);
    let (address, _own) =
        serve(&house, servers.x509_svid("spiffe://servers/broker", &["localhost"], 3600).unwrap()).await;
    let config = client(&servers, Some(corp.x509_svid(AGENT, &[], 60).unwrap()), TLS13);
    let mut open = connect(&config, address).await.unwrap();
    assert_eq!(request(&mut open).await.unwrap(), AGENT);
    house.clock.advance_secs(61);
    assert_eq!(request(&mut open).await.unwrap(), "refused Expired");
}

#[tokio::test]
async fn the_listener_takes_nobody_without_an_svid_and_no_older_tls() {
    let clock = TestClock::new();
    let servers = DevAuthority::new("servers", clock.clone()).unwrap();
    let corp = DevAuthority::new("corp", clock.clone()).unwrap();
    let house = House::new(&[("corp", corp.bundle_document())], &["corp"]);
    let (address, _own) =
        serve(&house, servers.x509_svid("spiffe://servers/broker", &["localhost"], 3600).unwrap()).await;
    let refused = async |config: Arc<rustls::ClientConfig>| match connect(&config, address).await {
        Ok(mut connection) => request(&mut connection).await.is_err(),
        Err(_) => true,
    };
    let svid = |authority: &DevAuthority, id: &str| authority.x509_svid(id, &[], 600).unwrap();
    assert!(!refused(client(&servers, Some(svid(&corp, AGENT)), TLS13)).await);
    assert!(refused(client(&servers, None, TLS13)).await, "no certificate");
    assert!(refused(client(&servers, Some(svid(&servers, "spiffe://servers/x")), TLS13)).await, "another trust domain");
    let stranger = DevAuthority::new("corp", clock.clone()).unwrap();
    assert!(refused(client(&servers, Some(svid(&stranger, AGENT)), TLS13)).await, "another CA of the same name");
    assert!(refused(client(&servers, Some(svid(&corp, AGENT)), &[&rustls::version::TLS12])).await, "TLS 1.2");
    // The right certificate without its key.
    let mut stolen = svid(&corp, AGENT);
    stolen.key = svid(&corp, AGENT).key;
    let builder = rustls::ClientConfig::builder_with_provider(rustls::crypto::aws_lc_rs::default_provider().into());
    let provider = rustls::crypto::aws_lc_rs::default_provider();
    let signer = provider.key_provider.load_private_key(stolen.key.clone_key()).unwrap();
    let mut roots = rustls::RootCertStore::empty();
    roots.add(servers.x509_authorities()[0].clone()).unwrap();
    let resolver = rustls::sign::CertifiedKey::new(stolen.chain.clone(), signer);
    let config = builder
        .with_protocol_versions(TLS13)
        .unwrap()
        .with_root_certificates(roots)
        .with_client_cert_resolver(Arc::new(rustls::sign::SingleCertAndKey::from(resolver)));
    assert!(refused(Arc::new(config)).await, "a certificate without its key");
}

#[test]
fn asking_again_for_each_request_costs_little() {
    let clock = TestClock::new();
    let corp = DevAuthority::new("corp", clock.clone()).unwrap();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    let _guard = runtime.enter();
    let house = House::new(&[("corp", corp.bundle_document())], &["corp"]);
    let chain = corp.x509_svid(AGENT, &[], 600).unwrap().chain;
    house.ask(&chain).unwrap();
    let started = std::time::Instant::now();
    for _ in 0..1000 {
        house.ask(&chain).unwrap();
    }
    let each = started.elapsed() / 1000;
    println!("remembered chain: {each:?}");
    assert!(each < std::time::Duration::from_millis(1), "{each:?}");
}

#[tokio::test]
async fn our_own_certificate_rotates_under_the_listener() {
    let clock = TestClock::new();
    let servers = DevAuthority::new("servers", clock.clone()).unwrap();
    let corp = DevAuthority::new("corp", clock.clone()).unwrap();
    let house = House::new(&[("corp", corp.bundle_document())], &["corp"]);
    let issue = || servers.x509_svid("spiffe://servers/broker", &["localhost"], 3600).unwrap();
    let (address, own) = serve(&house, issue()).await;
    let config = client(&servers, Some(corp.x509_svid(AGENT, &[], 600).unwrap()), TLS13);
    let seen =
        async || connect(&config, address).await.unwrap().get_ref().get_ref().1.peer_certificates().unwrap()[0].clone();
    let first = seen().await;
    assert_eq!(first, seen().await);
    let next = issue();
    own.send_replace(Some(Arc::new(next.clone())));
    assert_eq!(seen().await, next.chain[0]);
    own.send_replace(None);
    assert!(connect(&config, address).await.is_err());
}

#[test]
fn limits_of_trust_domains_and_of_what_is_remembered() {
    let clock = TestClock::new();
    let base = tempfile::tempdir().unwrap();
    let names: Vec<String> = (0..257).map(|n| format!("d{n}")).collect();
    let try_with = |count: usize| {
        let mut config = config(&[], &[]);
        config.workload_api = Some("unix:///nowhere".into());
        config.trust_domains = names[..count].to_vec();
        Identities::new(Some(&config), &[], base.path(), clock.clone()).map(|_| ())
    };
    assert!(try_with(256).is_ok() && try_with(257).is_err() && try_with(0).is_err());

    // A chain of more than 64 KiB, though of few certificates.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let _guard = runtime.enter();
    let forge = Forge::new(&clock);
    let house = House::new(&[("corp", forge.ca.pem())], &["corp"]);
    let fat = forge.leaf(|p| {
        let content = vec![4; 65 * 1024];
        p.custom_extensions = vec![rcgen::CustomExtension::from_oid_content(&[1, 3, 6, 1, 4, 1, 99999, 1], content)];
    });
    assert_eq!(house.refusal(&fat), Refusal::Malformed);
}
