//! The accept loop: TLS handshakes in their own tasks with a deadline, a limit of connections, headers with a limit
//! of size and time, and an end that lets what is in flight finish.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::Request;
use hyper::body::Incoming;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use hyper_util::server::graceful::GracefulShutdown;
use rustls_pki_types::CertificateDer;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;
use tower::ServiceExt;

use crate::config::Limits;

/// HTTP/2 streams of one connection at once.
const STREAMS_MAX: u32 = 128;
/// How long what is in flight may take once the end has begun.
pub const DRAIN: Duration = Duration::from_secs(10);

/// Who is at the other end of a connection.
#[derive(Debug, Clone)]
pub struct Peer {
    /// Its address.
    pub address: SocketAddr,
    /// Its certificate chain, leaf first; empty without client certificates. The handshake has checked possession
    /// of the key; who it is, is asked anew for each request.
    pub certificates: Arc<Vec<CertificateDer<'static>>>,
}

/// One listener: an address, with or without TLS, and what answers there.
pub struct Listener {
    /// For logs.
    pub name: &'static str,
    /// Where.
    pub socket: TcpListener,
    /// TLS; `None` only on loopback.
    pub tls: Option<Arc<arc_swap::ArcSwap<rustls::ServerConfig>>>,
    /// What answers.
    pub router: Router,
}

/// Serves until `stop`, then lets what is in flight finish, at most [`DRAIN`].
pub async fn serve(listener: Listener, limits: Limits, stop: CancellationToken) {
    let Listener { name, socket, tls, router } = listener;
    let permits = Arc::new(Semaphore::new(limits.connections_max));
    let graceful = Arc::new(parking_lot::Mutex::new(Some(GracefulShutdown::new())));
    let limits = Arc::new(limits);
    loop {
        let permit = tokio::select! {
            () = stop.cancelled() => break,
            permit = Arc::clone(&permits).acquire_owned() => permit,
        };
        let Ok(permit) = permit else { break };
        let accepted = tokio::select! {
            () = stop.cancelled() => break,
            accepted = socket.accept() => accepted,
        };
        let (stream, address) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                // Out of file descriptors, mostly: others must end first.
                tracing::warn!(listener = name, %error, "can't accept");
                tokio::time::sleep(Duration::from_millis(20)).await;
                continue;
            }
        };
        let _ = stream.set_nodelay(true);
        let (tls, router, limits, graceful) = (tls.clone(), router.clone(), Arc::clone(&limits), Arc::clone(&graceful));
        tokio::spawn(async move {
            let _permit = permit;
            match tls {
                None => {
                    let peer = Peer { address, certificates: Arc::new(Vec::new()) };
                    connection(stream, peer, router, &limits, &graceful).await;
                }
                Some(tls) => {
                    let acceptor = TlsAcceptor::from(tls.load_full());
                    let deadline = Duration::from_millis(limits.handshake_ms_max);
                    let Ok(Ok(stream)) = tokio::time::timeout(deadline, acceptor.accept(stream)).await else {
                        tracing::debug!(listener = name, %address, "a TLS handshake failed or took too long");
                        return;
                    };
                    let certificates: Vec<CertificateDer<'static>> = stream
                        .get_ref()
                        .1
                        .peer_certificates()
                        .into_iter()
                        .flatten()
                        .map(|c| c.clone().into_owned())
                        .collect();
                    let peer = Peer { address, certificates: Arc::new(certificates) };
                    connection(stream, peer, router, &limits, &graceful).await;
                }
            }
        });
    }
    let graceful = graceful.lock().take();
    if let Some(graceful) = graceful
        && tokio::time::timeout(DRAIN, graceful.shutdown()).await.is_err()
    {
        tracing::warn!(listener = name, "some connections were still busy and are dropped");
    }
}

async fn connection<S: AsyncRead + AsyncWrite + Unpin + Send + 'static>(
    stream: S,
    peer: Peer,
    router: Router,
    limits: &Limits,
    graceful: &parking_lot::Mutex<Option<GracefulShutdown>>,
) {
    let service = hyper::service::service_fn(move |mut request: hyper::Request<Incoming>| {
        request.extensions_mut().insert(peer.clone());
        router.clone().oneshot(Request::from(request.map(axum::body::Body::new)))
    });
    let mut builder = auto::Builder::new(TokioExecutor::new());
    builder
        .http1()
        .timer(TokioTimer::new())
        .header_read_timeout(Duration::from_millis(limits.header_read_ms_max))
        .max_buf_size(limits.header_bytes_max.max(8192))
        .http2()
        .timer(TokioTimer::new())
        .max_header_list_size(u32::try_from(limits.header_bytes_max).unwrap_or(u32::MAX))
        .max_concurrent_streams(STREAMS_MAX);
    let connection = builder.serve_connection_with_upgrades(TokioIo::new(stream), service).into_owned();
    let watched = match graceful.lock().as_ref() {
        Some(graceful) => graceful.watch(connection),
        None => return, // the end has begun
    };
    if let Err(error) = watched.await {
        tracing::debug!(%error, "a connection ended badly");
    }
}
