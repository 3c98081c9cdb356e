//! A SPIFFE Workload API on a Unix socket, for `dev`, `tour` and the tests: one socket, one identity. Only processes
//! of our own user are answered, and only when they send the metadata that keeps browsers and proxies out.

use std::convert::Infallible;
use std::future::Future;
use std::os::unix::fs::{DirBuilderExt as _, FileTypeExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use futures::Stream;
use futures::StreamExt as _;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::watch;
use tokio_stream::wrappers::UnixListenerStream;
use tokio_util::sync::CancellationToken;
use tonic::body::Body;
use tonic::server::{Grpc, ServerStreamingService, UnaryService};
use tonic::{Request, Response, Status};
use tonic_prost::ProstCodec;

use super::dev_authority::{DevAuthority, JWT_SVID_SECS, X509_SVID_SECS};
use super::error::{IdentityError, Refusal};
use super::jwt::{Expected, KeySet, KeyUse, Token, TokenKind};
use super::svid::{JWT_SVID_ALGORITHMS, JWT_SVID_LIFE_SECS_MAX};
use super::workload_proto as proto;

/// Most audiences in one request.
pub const AUDIENCES_MAX: usize = 8;
/// Longest audience, in bytes.
pub const AUDIENCE_BYTES_MAX: usize = 512;
/// Largest request, in bytes.
pub const REQUEST_BYTES_MAX: usize = 64 * 1024;
/// Streams and calls at once on one connection.
pub const STREAMS_MAX: u32 = 64;

/// A running Workload API. Dropping it stops it and removes the socket.
#[derive(Debug)]
pub struct WorkloadApiServer {
    path: PathBuf,
    stop: CancellationToken,
}

impl WorkloadApiServer {
    /// Serves `spiffe_id` on `path`. The socket's folder is made with mode 0700 if it isn't there, and must be ours
    /// and closed to others if it is. Needs a tokio runtime.
    pub fn start(path: &Path, authority: Arc<DevAuthority>, spiffe_id: &str) -> Result<Self, IdentityError> {
        Self::start_with(path, authority, spiffe_id, X509_SVID_SECS, JWT_SVID_SECS)
    }

    /// The same with SVIDs of other lives, in seconds.
    pub fn start_with(
        path: &Path,
        authority: Arc<DevAuthority>,
        spiffe_id: &str,
        x509_secs: u64,
        jwt_secs: u64,
    ) -> Result<Self, IdentityError> {
        let fail = |e: &dyn std::fmt::Display| {
            IdentityError::new(
                Refusal::Configuration,
                format!("can't serve the Workload API on {}: {e}", path.display()),
            )
        };
        // Issuing once shows that the identity is one of this authority.
        authority.jwt_svid(spiffe_id, &["probe"], 1)?;
        let uid = rustix::process::geteuid().as_raw();
        let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).ok_or_else(|| fail(&"it has no folder"))?;
        private_folder(folder, uid).map_err(|e| fail(&e))?;
        if std::fs::symlink_metadata(path).is_ok_and(|meta| meta.file_type().is_socket()) {
            std::fs::remove_file(path).map_err(|e| fail(&e))?;
        }
        let listener = UnixListener::bind(path).map_err(|e| fail(&e))?;
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).map_err(|e| fail(&e))?;

        let stop = CancellationToken::new();
        let issuer =
            Arc::new(Issuer { authority, spiffe_id: spiffe_id.to_owned(), x509_secs, jwt_secs, stop: stop.clone() });
        let ours = move |stream: &std::io::Result<UnixStream>| {
            let ours = stream.as_ref().is_ok_and(|s| s.peer_cred().is_ok_and(|peer| peer.uid() == uid));
            std::future::ready(ours)
        };
        let incoming = UnixListenerStream::new(listener).filter(ours);
        let stopped = stop.clone().cancelled_owned();
        let serve = tonic::transport::Server::builder()
            .max_concurrent_streams(STREAMS_MAX)
            .serve_with_incoming_shutdown(WorkloadService(issuer), incoming, stopped);
        tokio::spawn(async move {
            if let Err(error) = serve.await {
                tracing::error!(%error, "the Workload API stopped");
            }
        });
        Ok(Self { path: path.to_owned(), stop })
    }

    /// What goes into `SPIFFE_ENDPOINT_SOCKET`.
    pub fn endpoint(&self) -> String {
        format!("unix://{}", self.path.display())
    }
}

impl Drop for WorkloadApiServer {
    fn drop(&mut self) {
        self.stop.cancel();
        let _ = std::fs::remove_file(&self.path);
    }
}

fn private_folder(folder: &Path, uid: u32) -> Result<(), String> {
    use std::os::unix::fs::MetadataExt as _;
    match std::fs::DirBuilder::new().mode(0o700).create(folder) {
        Ok(()) => {}
        Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => {}
        Err(e) => return Err(e.to_string()),
    }
    let meta = std::fs::symlink_metadata(folder).map_err(|e| e.to_string())?;
    if !meta.is_dir() || meta.uid() != uid || meta.mode() & 0o077 != 0 {
        return Err("its folder must belong to this user and have mode 0700".to_owned());
    }
    Ok(())
}

/// What the calls answer from.
struct Issuer {
    authority: Arc<DevAuthority>,
    spiffe_id: String,
    x509_secs: u64,
    jwt_secs: u64,
    stop: CancellationToken,
}

fn internal(error: IdentityError) -> Status {
    tracing::error!(%error, "Workload API");
    Status::internal("the development authority could not issue")
}

impl Issuer {
    fn domain_id(&self) -> String {
        format!("spiffe://{}", self.authority.trust_domain())
    }

    fn x509_bundle(&self) -> Vec<u8> {
        self.authority.x509_authorities().iter().flat_map(|der| der.as_ref().to_vec()).collect()
    }

    fn x509_svid(&self) -> Result<proto::X509SvidResponse, Status> {
        let svid = self.authority.x509_svid(&self.spiffe_id, &[], self.x509_secs).map_err(internal)?;
        let entry = proto::X509Svid {
            spiffe_id: svid.spiffe_id,
            x509_svid: svid.chain.iter().flat_map(|der| der.as_ref().to_vec()).collect(),
            x509_svid_key: svid.key.secret_der().to_vec(),
            bundle: self.x509_bundle(),
        };
        Ok(proto::X509SvidResponse { svids: vec![entry], ..Default::default() })
    }

    fn x509_bundles(&self) -> proto::X509BundlesResponse {
        proto::X509BundlesResponse { bundles: [(self.domain_id(), self.x509_bundle())].into() }
    }

    fn jwt_bundles(&self) -> proto::JwtBundlesResponse {
        proto::JwtBundlesResponse { bundles: [(self.domain_id(), self.authority.jwks().into_bytes())].into() }
    }

    fn jwt_svid(&self, request: &proto::JwtSvidRequest) -> Result<proto::JwtSvidResponse, Status> {
        let audience: Vec<&str> = request.audience.iter().map(String::as_str).collect();
        if audience.is_empty() || audience.len() > AUDIENCES_MAX {
            return Err(Status::invalid_argument("name 1 to 8 audiences"));
        }
        if audience.iter().any(|a| a.is_empty() || a.len() > AUDIENCE_BYTES_MAX) {
            return Err(Status::invalid_argument("an audience has 1 to 512 bytes"));
        }
        if !request.spiffe_id.is_empty() && request.spiffe_id != self.spiffe_id {
            return Err(Status::permission_denied("this socket serves another identity"));
        }
        let svid = self.authority.jwt_svid(&self.spiffe_id, &audience, self.jwt_secs).map_err(internal)?;
        let entry = proto::JwtSvid { spiffe_id: self.spiffe_id.clone(), svid };
        Ok(proto::JwtSvidResponse { svids: vec![entry] })
    }

    fn validate(&self, request: &proto::ValidateJwtSvidRequest) -> Result<proto::ValidateJwtSvidResponse, Status> {
        if request.audience.is_empty() || request.svid.is_empty() {
            return Err(Status::invalid_argument("both audience and svid are needed"));
        }
        let invalid = |e: &dyn std::fmt::Display| Status::invalid_argument(format!("the JWT-SVID is not valid: {e}"));
        let keys = KeySet::from_jwks(self.authority.jwks().as_bytes(), KeyUse::JwtSvid).map_err(|e| invalid(&e))?;
        let expected = Expected {
            kind: TokenKind::JwtSvid,
            algorithms: &JWT_SVID_ALGORITHMS,
            issuer: None,
            audience: &request.audience,
            life_secs_max: JWT_SVID_LIFE_SECS_MAX,
        };
        let now = self.authority.clock().wall();
        let claims =
            Token::parse(&request.svid).and_then(|t| t.verify(&keys, &expected, now)).map_err(|e| invalid(&e))?;
        Ok(proto::ValidateJwtSvidResponse { spiffe_id: claims.subject, claims: Some((&claims.all).into()) })
    }

    /// One message now, and one after each rotation; with `every`, also when so much time has passed.
    fn pushes<T: Send + 'static>(
        self: Arc<Self>,
        every: Option<Duration>,
        make: fn(&Self) -> Result<T, Status>,
    ) -> Messages<T> {
        struct State {
            issuer: Arc<Issuer>,
            changes: watch::Receiver<u64>,
            first: bool,
        }
        let mut changes = self.authority.changes();
        changes.mark_unchanged();
        let state = State { issuer: self, changes, first: true };
        Box::pin(futures::stream::unfold(state, move |mut state| async move {
            if !std::mem::take(&mut state.first) {
                let clock = Arc::clone(state.issuer.authority.clock());
                let rotated = async {
                    match every {
                        Some(pause) => clock.sleep(pause).await,
                        None => std::future::pending().await,
                    }
                };
                tokio::select! {
                    () = state.issuer.stop.cancelled() => return None,
                    () = rotated => {}
                    changed = state.changes.changed() => changed.ok()?,
                }
            }
            Some((make(&state.issuer), state))
        }))
    }
}

type Messages<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;
type Answer<T> = Pin<Box<dyn Future<Output = Result<Response<T>, Status>> + Send>>;

fn answer<T: Send + 'static>(result: Result<T, Status>) -> Answer<T> {
    Box::pin(std::future::ready(result.map(Response::new)))
}

struct FetchX509Svid(Arc<Issuer>);
impl ServerStreamingService<proto::Empty> for FetchX509Svid {
    type Response = proto::X509SvidResponse;
    type ResponseStream = Messages<Self::Response>;
    type Future = Answer<Self::ResponseStream>;
    fn call(&mut self, _: Request<proto::Empty>) -> Self::Future {
        let half_life = Duration::from_secs(self.0.x509_secs.div_ceil(2));
        answer(Ok(Arc::clone(&self.0).pushes(Some(half_life), Issuer::x509_svid)))
    }
}

struct FetchX509Bundles(Arc<Issuer>);
impl ServerStreamingService<proto::Empty> for FetchX509Bundles {
    type Response = proto::X509BundlesResponse;
    type ResponseStream = Messages<Self::Response>;
    type Future = Answer<Self::ResponseStream>;
    fn call(&mut self, _: Request<proto::Empty>) -> Self::Future {
        answer(Ok(Arc::clone(&self.0).pushes(None, |issuer| Ok(issuer.x509_bundles()))))
    }
}

struct FetchJwtBundles(Arc<Issuer>);
impl ServerStreamingService<proto::Empty> for FetchJwtBundles {
    type Response = proto::JwtBundlesResponse;
    type ResponseStream = Messages<Self::Response>;
    type Future = Answer<Self::ResponseStream>;
    fn call(&mut self, _: Request<proto::Empty>) -> Self::Future {
        answer(Ok(Arc::clone(&self.0).pushes(None, |issuer| Ok(issuer.jwt_bundles()))))
    }
}

struct FetchJwtSvid(Arc<Issuer>);
impl UnaryService<proto::JwtSvidRequest> for FetchJwtSvid {
    type Response = proto::JwtSvidResponse;
    type Future = Answer<Self::Response>;
    fn call(&mut self, request: Request<proto::JwtSvidRequest>) -> Self::Future {
        answer(self.0.jwt_svid(request.get_ref()))
    }
}

struct ValidateJwtSvid(Arc<Issuer>);
impl UnaryService<proto::ValidateJwtSvidRequest> for ValidateJwtSvid {
    type Response = proto::ValidateJwtSvidResponse;
    type Future = Answer<Self::Response>;
    fn call(&mut self, request: Request<proto::ValidateJwtSvidRequest>) -> Self::Future {
        answer(self.0.validate(request.get_ref()))
    }
}

/// `SpiffeWorkloadAPI`, as tonic's code generator would have written it.
#[derive(Clone)]
struct WorkloadService(Arc<Issuer>);

fn grpc<Res, Req>() -> Grpc<ProstCodec<Res, Req>>
where
    Res: prost::Message + Send + 'static,
    Req: prost::Message + Default + Send + 'static,
{
    Grpc::new(ProstCodec::default()).max_decoding_message_size(REQUEST_BYTES_MAX)
}

impl tower::Service<http::Request<Body>> for WorkloadService {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Infallible>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let issuer = Arc::clone(&self.0);
        Box::pin(async move {
            // SPIFFE Workload API, section 4.2: keeps what can only be made to send a plain request out.
            if request.headers().get("workload.spiffe.io").is_none_or(|v| v != "true") {
                let refused = Status::invalid_argument("the metadata `workload.spiffe.io: true` is missing");
                return Ok(refused.into_http());
            }
            Ok(match request.uri().path() {
                "/SpiffeWorkloadAPI/FetchX509SVID" => grpc().server_streaming(FetchX509Svid(issuer), request).await,
                "/SpiffeWorkloadAPI/FetchX509Bundles" => {
                    grpc().server_streaming(FetchX509Bundles(issuer), request).await
                }
                "/SpiffeWorkloadAPI/FetchJWTBundles" => grpc().server_streaming(FetchJwtBundles(issuer), request).await,
                "/SpiffeWorkloadAPI/FetchJWTSVID" => grpc().unary(FetchJwtSvid(issuer), request).await,
                "/SpiffeWorkloadAPI/ValidateJWTSVID" => grpc().unary(ValidateJwtSvid(issuer), request).await,
                _ => Status::unimplemented("").into_http(),
            })
        })
    }
}
