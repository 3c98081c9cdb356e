//! "Any SPIFFE library works against it": the development Workload API, asked by the `spiffe` crate, by a bare gRPC client, by
//! go-spiffe (where Go and its module are at hand) and by the broker's own bundle watcher.

#[path = "support/identity_kit.rs"]
mod kit;

use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use countersign::config::SpiffeConfig;
use countersign::identity::dev_authority::DevAuthority;
use countersign::identity::spiffe::{Svid, WorkloadApi, watch_svid};
use countersign::identity::workload_api::WorkloadApiServer;
use countersign::identity::workload_proto as proto;
use countersign::identity::{Identities, Refusal};
use countersign::time::{Clock, SystemClock};
use kit::until;
use spiffe::{JwtSource, TrustDomain, WorkloadApiClient, X509Source};
use tokio_util::sync::CancellationToken;

const AGENT: &str = "spiffe://corp/agent/7";
const AUDIENCE: &str = "https://broker.example";

struct Api {
    authority: Arc<DevAuthority>,
    server: Option<WorkloadApiServer>,
    socket: PathBuf,
    folder: tempfile::TempDir,
}

impl Api {
    fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("api/agent.sock");
        let authority = Arc::new(DevAuthority::new("corp", Arc::new(SystemClock)).unwrap());
        let server = WorkloadApiServer::start(&socket, Arc::clone(&authority), AGENT).unwrap();
        Self { authority, server: Some(server), socket, folder }
    }
    fn endpoint(&self) -> String {
        self.server.as_ref().unwrap().endpoint()
    }
}

#[tokio::test]
async fn the_spiffe_crate_gets_svids_and_bundles_and_sees_rotation() {
    let api = Api::start();
    let source = X509Source::builder().endpoint(api.endpoint()).build().await.unwrap();
    let first = source.svid().unwrap();
    assert_eq!(first.spiffe_id().to_string(), AGENT);
    let domain = TrustDomain::new("corp").unwrap();
    assert_eq!(source.bundle_set().unwrap().get(&domain).unwrap().authorities().len(), 1);

    let jwts = JwtSource::builder().endpoint(api.endpoint()).build().await.unwrap();
    let svid = jwts.fetch_jwt_svid([AUDIENCE]).await.unwrap();
    assert_eq!(svid.spiffe_id().to_string(), AGENT);
    // Verified by the crate, not by us, against the bundle that it was given.
    let bundles = jwts.bundle_set().unwrap();
    spiffe::JwtSvid::parse_and_validate(svid.token(), &*bundles, &[AUDIENCE]).unwrap();
    assert!(spiffe::JwtSvid::parse_and_validate(svid.token(), &*bundles, &["other"]).is_err());

    api.authority.rotate().unwrap();
    until("the X.509 bundle with two authorities arrives", async || {
        source.bundle_set().unwrap().get(&domain).unwrap().authorities().len() == 2
    })
    .await;
    until("a new SVID arrives", async || source.svid().unwrap().leaf().as_bytes() != first.leaf().as_bytes()).await;
    let fresh = jwts.fetch_jwt_svid([AUDIENCE]).await.unwrap();
    assert_ne!(fresh.key_id(), svid.key_id());
    until("the JWT bundle with both keys arrives", async || {
        let bundle = jwts.try_bundle_for_trust_domain(&domain).unwrap();
        bundle.find_jwt_authority(fresh.key_id()).is_some() && bundle.find_jwt_authority(svid.key_id()).is_some()
    })
    .await;
    api.authority.forget_old();
    until("the old authorities are gone", async || {
        source.bundle_set().unwrap().get(&domain).unwrap().authorities().len() == 1
            && jwts.try_bundle_for_trust_domain(&domain).unwrap().find_jwt_authority(svid.key_id()).is_none()
    })
    .await;
    source.shutdown().await;
    jwts.shutdown().await;
}

#[tokio::test]
async fn validate_says_yes_and_no() {
    let api = Api::start();
    let client = WorkloadApiClient::connect_to(api.endpoint()).await.unwrap();
    let token = client.fetch_jwt_token([AUDIENCE], None).await.unwrap();
    let validated = client.validate_jwt_token(AUDIENCE, &token).await.unwrap();
    assert_eq!(validated.spiffe_id().to_string(), AGENT);
    assert!(client.validate_jwt_token("other", &token).await.is_err());
    let stranger = DevAuthority::new("corp", Arc::new(SystemClock)).unwrap();
    assert!(client.validate_jwt_token(AUDIENCE, &stranger.jwt_svid(AGENT, &[AUDIENCE], 60).unwrap()).await.is_err());
    assert!(client.validate_jwt_token("", &token).await.is_err());
    let other = "spiffe://corp/agent/8".parse().unwrap();
    assert!(client.fetch_jwt_token([AUDIENCE], Some(&other)).await.is_err(), "another identity than the socket's");
    assert!(client.fetch_jwt_token(Vec::<String>::new(), None).await.is_err());
    assert!(client.fetch_jwt_token((0..9).map(|n| n.to_string()), None).await.is_err());
    assert!(client.fetch_jwt_token(["a".repeat(513)], None).await.is_err());
}

async fn channel(socket: &Path) -> Result<tonic::transport::Channel, tonic::transport::Error> {
    let socket = socket.to_owned();
    tonic::transport::Endpoint::from_static("http://localhost")
        .connect_with_connector(tower::service_fn(move |_: http::Uri| {
            let socket = socket.clone();
            async move {
                Ok::<_, std::io::Error>(hyper_util::rt::TokioIo::new(tokio::net::UnixStream::connect(socket).await?))
            }
        }))
        .await
}

#[tokio::test]
async fn a_call_without_the_metadata_is_refused() {
    let api = Api::start();
    let call = async |path: &'static str, security: Option<&'static str>| {
        let mut client = tonic::client::Grpc::new(channel(&api.socket).await.unwrap());
        client.ready().await.unwrap();
        let mut request =
            tonic::Request::new(proto::JwtSvidRequest { audience: vec!["a".into()], spiffe_id: String::new() });
        if let Some(value) = security {
            request.metadata_mut().insert("workload.spiffe.io", value.parse().unwrap());
        }
        let codec = tonic_prost::ProstCodec::<proto::JwtSvidRequest, proto::JwtSvidResponse>::default();
        client.unary(request, http::uri::PathAndQuery::from_static(path), codec).await.map_err(|s| s.code())
    };
    let path = "/SpiffeWorkloadAPI/FetchJWTSVID";
    for value in [None, Some("false"), Some("True"), Some("")] {
        assert_eq!(call(path, value).await.unwrap_err(), tonic::Code::InvalidArgument, "{value:?}");
    }
    assert_eq!(call(path, Some("true")).await.unwrap().into_inner().svids[0].spiffe_id, AGENT);
    assert_eq!(call("/SpiffeWorkloadAPI/Other", Some("true")).await.unwrap_err(), tonic::Code::Unimplemented);
}

#[tokio::test]
async fn the_socket_is_ours_alone() {
    let api = Api::start();
    let own = api.socket.parent().unwrap();
    assert_eq!(std::fs::metadata(own).unwrap().permissions().mode() & 0o777, 0o700);
    assert_eq!(std::fs::metadata(&api.socket).unwrap().permissions().mode() & 0o777, 0o600);
    // A folder that others can look into is refused.
    let open = tempfile::tempdir().unwrap();
    std::fs::set_permissions(open.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
    assert!(WorkloadApiServer::start(&open.path().join("s"), Arc::clone(&api.authority), AGENT).is_err());
    assert!(WorkloadApiServer::start(&own.join("t"), Arc::clone(&api.authority), "spiffe://other/a").is_err());

    if !rustix::process::geteuid().is_root() {
        eprintln!("SKIPPED: another user's connection (needs root to become one)");
        return;
    }
    // With the modes out of the way, the peer's user id still decides.
    let outer = api.folder.path();
    for path in [outer, own] {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o777)).unwrap();
    }
    std::fs::set_permissions(&api.socket, std::fs::Permissions::from_mode(0o666)).unwrap();
    let ask = |user: Option<u32>| {
        let script = "import socket,sys\ns=socket.socket(socket.AF_UNIX)\ns.settimeout(5)\ns.connect(sys.argv[1])\n\
                      s.sendall(b'PRI * HTTP/2.0\\r\\n\\r\\nSM\\r\\n\\r\\n'+bytes([0,0,0,4,0,0,0,0,0]))\nprint(len(s.recv(64)))";
        let mut command = std::process::Command::new("/usr/bin/python3");
        command.args(["-c", script, api.socket.to_str().unwrap()]);
        if let Some(uid) = user {
            use std::os::unix::process::CommandExt as _;
            command.uid(uid).gid(uid);
        }
        command
    };
    let run = async |mut command: std::process::Command| {
        tokio::task::spawn_blocking(move || command.output()).await.unwrap().unwrap()
    };
    let ours = run(ask(None)).await;
    let answered =
        |out: &std::process::Output| String::from_utf8_lossy(&out.stdout).trim().parse::<usize>().unwrap_or(0) > 0;
    assert!(answered(&ours), "{ours:?}");
    let other = run(ask(Some(65534))).await;
    let connected = !String::from_utf8_lossy(&other.stderr).contains("PermissionError");
    assert!(connected && !answered(&other), "{other:?}");
}

#[tokio::test]
async fn our_own_svids_come_from_it_and_stay_fresh() {
    let api = Api::start();
    let workload = WorkloadApi::connect(&api.endpoint()).await.unwrap();
    let svid: Svid = workload.x509_svid().await.unwrap();
    assert_eq!(svid.spiffe_id, AGENT);
    assert!(!format!("{svid:?}").contains("PRIVATE"));
    assert_eq!(workload.x509_authorities().await.unwrap(), api.authority.x509_authorities());
    let token = workload.fetch_jwt_svid(AUDIENCE).await.unwrap();
    assert_eq!(token.expose().split('.').count(), 3);
    let stop = CancellationToken::new();
    let watched = watch_svid(&api.endpoint(), Arc::new(SystemClock), stop.clone());
    until("the first one", async || watched.borrow().is_some()).await;
    let first = watched.borrow().clone().unwrap().chain[0].clone();
    api.authority.rotate().unwrap();
    until("a new one after rotation", async || watched.borrow().as_ref().unwrap().chain[0] != first).await;
    stop.cancel();
}

#[tokio::test]
async fn the_broker_follows_bundles_from_the_workload_api_through_rotation_removal_and_restart() {
    let mut api = Api::start();
    let config = SpiffeConfig {
        workload_api: Some(api.endpoint()),
        bundles: std::collections::BTreeMap::new(),
        trust_domains: vec!["corp".into()],
        audience: AUDIENCE.into(),
        tier_max: None,
    };
    let clock: Arc<dyn Clock> = Arc::new(SystemClock);
    let identities = Identities::new(Some(&config), &[], Path::new("."), Arc::clone(&clock)).unwrap();
    let stop = CancellationToken::new();
    identities.start(&stop);
    let by_jwt = async |token: &str| identities.authenticate_bearer(token, clock.wall()).await;
    let chain = |authority: &DevAuthority| authority.x509_svid(AGENT, &[], 600).unwrap().chain;
    let jwt = |authority: &DevAuthority| authority.jwt_svid(AGENT, &[AUDIENCE], 60).unwrap();

    let (old_chain, old_jwt) = (chain(&api.authority), jwt(&api.authority));
    until("both bundles arrive", async || {
        identities.authenticate_certificate(&old_chain, clock.wall()).is_ok() && by_jwt(&old_jwt).await.is_ok()
    })
    .await;
    api.authority.rotate().unwrap();
    let (new_chain, new_jwt) = (chain(&api.authority), jwt(&api.authority));
    until("the new authorities are believed", async || {
        identities.authenticate_certificate(&new_chain, clock.wall()).is_ok() && by_jwt(&new_jwt).await.is_ok()
    })
    .await;
    assert!(identities.authenticate_certificate(&old_chain, clock.wall()).is_ok() && by_jwt(&old_jwt).await.is_ok());
    api.authority.forget_old();
    until("the old ones are not", async || {
        let x509 = identities.authenticate_certificate(&old_chain, clock.wall());
        let jwt = by_jwt(&old_jwt).await;
        x509.is_err_and(|e| e.refusal() == Refusal::BadSignature)
            && jwt.is_err_and(|e| e.refusal() == Refusal::UnknownKey)
    })
    .await;
    // The Workload API goes away and comes back with other keys: what was known counts on, then the new.
    drop(api.server.take());
    assert!(identities.authenticate_certificate(&new_chain, clock.wall()).is_ok());
    let other = Arc::new(DevAuthority::new("corp", Arc::clone(&clock)).unwrap());
    until("the socket can be taken again", async || {
        api.server = WorkloadApiServer::start(&api.socket, Arc::clone(&other), AGENT).ok();
        api.server.is_some()
    })
    .await;
    let after = chain(&other);
    until("the broker came back to it", async || identities.authenticate_certificate(&after, clock.wall()).is_ok())
        .await;
    assert!(identities.authenticate_certificate(&new_chain, clock.wall()).is_err());
    stop.cancel();
}

/// A Workload API whose X.509 bundles the test writes: what a SPIRE agent hands on of federated domains.
#[derive(Clone)]
struct Federated(tokio::sync::watch::Receiver<proto::X509BundlesResponse>);

impl tonic::server::ServerStreamingService<proto::Empty> for Federated {
    type Response = proto::X509BundlesResponse;
    type ResponseStream = futures::stream::BoxStream<'static, Result<Self::Response, tonic::Status>>;
    type Future = std::future::Ready<Result<tonic::Response<Self::ResponseStream>, tonic::Status>>;
    fn call(&mut self, _: tonic::Request<proto::Empty>) -> Self::Future {
        let mut changes = self.0.clone();
        changes.mark_changed();
        let messages = futures::stream::unfold(changes, async |mut changes| {
            changes.changed().await.ok()?;
            let now = changes.borrow_and_update().clone();
            Some((Ok(now), changes))
        });
        std::future::ready(Ok(tonic::Response::new(Box::pin(messages))))
    }
}

impl tower::Service<http::Request<tonic::body::Body>> for Federated {
    type Response = http::Response<tonic::body::Body>;
    type Error = std::convert::Infallible;
    type Future = futures::future::BoxFuture<'static, Result<Self::Response, Self::Error>>;
    fn poll_ready(&mut self, _: &mut std::task::Context<'_>) -> std::task::Poll<Result<(), Self::Error>> {
        std::task::Poll::Ready(Ok(()))
    }
    fn call(&mut self, request: http::Request<tonic::body::Body>) -> Self::Future {
        let service = self.clone();
        Box::pin(async move {
            Ok(match request.uri().path() {
                "/SpiffeWorkloadAPI/FetchX509Bundles" => {
                    let codec = tonic_prost::ProstCodec::<proto::X509BundlesResponse, proto::Empty>::default();
                    tonic::server::Grpc::new(codec).server_streaming(service, request).await
                }
                _ => tonic::Status::unimplemented("").into_http(),
            })
        })
    }
}

#[tokio::test]
async fn a10_a_partners_bad_bundle_takes_nothing_from_the_others() {
    let clock: Arc<dyn Clock> = Arc::new(SystemClock);
    let authority = |domain: &str| DevAuthority::new(domain, Arc::new(SystemClock)).unwrap();
    let chain = |authority: &DevAuthority, id: &str| authority.x509_svid(id, &[], 600).unwrap().chain;
    let der =
        |authority: &DevAuthority| authority.x509_authorities().iter().flat_map(|d| d.to_vec()).collect::<Vec<u8>>();
    let (corp, partner) = (authority("corp"), authority("partner"));
    // 33 authorities: one more than a domain may have.
    let too_many: Vec<u8> = (0..33).flat_map(|_| der(&authority("partner"))).collect();
    let say = |corp: Vec<u8>, partner: Vec<u8>| proto::X509BundlesResponse {
        bundles: [
            ("spiffe://corp".to_owned(), corp),
            ("spiffe://partner".to_owned(), partner),
            ("spiffe://stranger".to_owned(), too_many.clone()),
        ]
        .into(),
    };
    let (sender, receiver) = tokio::sync::watch::channel(say(der(&corp), der(&partner)));
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("agent.sock");
    let listener = tokio_stream::wrappers::UnixListenerStream::new(tokio::net::UnixListener::bind(&socket).unwrap());
    let serving = tokio::spawn(tonic::transport::Server::builder().serve_with_incoming(Federated(receiver), listener));

    let config = SpiffeConfig {
        workload_api: Some(format!("unix://{}", socket.display())),
        bundles: std::collections::BTreeMap::new(),
        trust_domains: vec!["corp".into(), "partner".into()],
        audience: AUDIENCE.into(),
        tier_max: None,
    };
    let identities = Identities::new(Some(&config), &[], Path::new("."), Arc::clone(&clock)).unwrap();
    let stop = CancellationToken::new();
    identities.start(&stop);
    let counts = |chain: &[rustls_pki_types::CertificateDer<'_>]| {
        identities.authenticate_certificate(chain, clock.wall()).is_ok()
    };
    let (old, theirs) = (chain(&corp, AGENT), chain(&partner, "spiffe://partner/a"));
    until("both domains' bundles arrive, whatever a third one's is", async || counts(&old) && counts(&theirs)).await;

    // The partner's goes bad: nobody of theirs is believed, and ours are, through rotation and removal.
    sender.send_replace(say(der(&corp), too_many.clone()));
    until("the partner's agents are believed no more", async || !counts(&theirs)).await;
    assert!(counts(&old));
    corp.rotate().unwrap();
    let new = chain(&corp, AGENT);
    sender.send_replace(say(der(&corp), too_many.clone()));
    until("the new authority is believed", async || counts(&new)).await;
    assert!(counts(&old));
    corp.forget_old();
    sender.send_replace(say(der(&corp), too_many.clone()));
    until("the old one is not", async || !counts(&old)).await;
    assert!(counts(&new) && !counts(&theirs));
    sender.send_replace(say(der(&corp), der(&partner)));
    until("the partner's bundle is mended", async || counts(&theirs)).await;
    stop.cancel();
    serving.abort();
}

#[tokio::test]
async fn a_spire_agent_where_there_is_one() {
    let Ok(endpoint) = std::env::var("SPIFFE_ENDPOINT_SOCKET") else {
        eprintln!("SKIPPED: a SPIRE agent (SPIFFE_ENDPOINT_SOCKET is not set)");
        return;
    };
    let workload = WorkloadApi::connect(&endpoint).await.unwrap();
    let svid = workload.x509_svid().await.unwrap();
    let domain = svid.spiffe_id.split('/').nth(2).unwrap().to_owned();
    let config = SpiffeConfig {
        workload_api: Some(endpoint),
        bundles: std::collections::BTreeMap::new(),
        trust_domains: vec![domain],
        audience: AUDIENCE.into(),
        tier_max: None,
    };
    let clock: Arc<dyn Clock> = Arc::new(SystemClock);
    let identities = Identities::new(Some(&config), &[], Path::new("."), Arc::clone(&clock)).unwrap();
    let stop = CancellationToken::new();
    identities.start(&stop);
    let jwt = workload.fetch_jwt_svid(AUDIENCE).await.unwrap();
    until("both bundles arrive", async || {
        let by_jwt = identities.authenticate_bearer(jwt.expose(), clock.wall()).await;
        let by_x509 = identities.authenticate_certificate(&svid.chain, clock.wall());
        by_jwt.is_ok_and(|a| a.id.as_str() == svid.spiffe_id) && by_x509.is_ok_and(|a| a.id.as_str() == svid.spiffe_id)
    })
    .await;
    stop.cancel();
}

#[tokio::test]
async fn go_spiffe_gets_svids_and_verifies_them() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/support/go-spiffe");
    let cache = std::env::var_os("COUNTERSIGN_PEERS").map_or_else(
        || PathBuf::from(std::env::var_os("HOME").unwrap_or_default()).join(".cache/countersign/peers"),
        PathBuf::from,
    );
    let client = cache.join("go-spiffe/client");
    let modified = |path: &Path| std::fs::metadata(path).and_then(|meta| meta.modified()).ok();
    if modified(&client) < modified(&folder.join("main.go")) {
        let build =
            std::process::Command::new("go").args(["build", "-o"]).arg(&client).arg(".").current_dir(&folder).output();
        if !build.as_ref().is_ok_and(|out| out.status.success()) {
            assert!(std::env::var_os("CI").is_none(), "go-spiffe can't be had: {build:?}");
            eprintln!("SKIPPED: go-spiffe (no Go, or its module can't be fetched)");
            return;
        }
    }
    let api = Api::start();
    let endpoint = api.endpoint();
    let mut command = tokio::process::Command::new(client);
    let out = command.args([AUDIENCE]).env("SPIFFE_ENDPOINT_SOCKET", endpoint).output().await.unwrap();
    let text = String::from_utf8_lossy(&out.stdout);
    assert!(out.status.success(), "{text}{}", String::from_utf8_lossy(&out.stderr));
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(
        lines,
        [
            format!("x509-svid {AGENT} verified"),
            format!("jwt-svid {AGENT} verified"),
            format!("workload-api validates {AGENT}"),
            "other audience refused".to_owned(),
        ]
    );
}
