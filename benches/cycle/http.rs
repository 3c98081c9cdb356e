//! One agent's keep-alive connection: HTTP/1.1 over TLS, as plain as it gets, so that the client costs little.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper_util::rt::TokioIo;
use serde::de::DeserializeOwned;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use crate::Outcome;

/// No call takes longer: a benchmark that hangs says so.
const CALL: Duration = Duration::from_secs(60);

/// A connection.
pub struct Connection {
    sender: SendRequest<Full<Bytes>>,
    host: String,
}

impl Connection {
    /// Connects and makes the TLS handshake.
    pub async fn open(port: u16, tls: &Arc<rustls::ClientConfig>) -> Outcome<Self> {
        let tcp = TcpStream::connect(("127.0.0.1", port)).await?;
        tcp.set_nodelay(true)?;
        let tls = TlsConnector::from(Arc::clone(tls)).connect("localhost".try_into()?, tcp).await?;
        let (sender, connection) = handshake(TokioIo::new(tls)).await?;
        tokio::spawn(connection);
        Ok(Self { sender, host: format!("localhost:{port}") })
    }

    /// One call. Anything but 200 is an error with what the broker said.
    pub async fn call<T: DeserializeOwned>(
        &mut self,
        method: &str,
        path: &str,
        jwt: &str,
        key: Option<&str>,
        body: Option<String>,
    ) -> Outcome<T> {
        let mut request = hyper::Request::builder()
            .method(method)
            .uri(path)
            .header("host", &self.host)
            .header("authorization", format!("Bearer {jwt}"));
        if let Some(key) = key {
            request = request.header("idempotency-key", key);
        }
        if body.is_some() {
            request = request.header("content-type", "application/json");
        }
        let request = request.body(Full::new(Bytes::from(body.unwrap_or_default())))?;
        let answer = async {
            self.sender.ready().await?;
            let response = self.sender.send_request(request).await?;
            let status = response.status();
            Ok::<_, hyper::Error>((status, response.into_body().collect().await?.to_bytes()))
        };
        let (status, bytes) = tokio::time::timeout(CALL, answer).await.map_err(|_| format!("{path}: no answer"))??;
        if status != 200 {
            return Err(format!("{method} {path}: {status}: {}", String::from_utf8_lossy(&bytes)).into());
        }
        Ok(serde_json::from_slice(&bytes)?)
    }
}

/// The client's side of TLS: trusts one CA.
pub fn client_config(
    authorities: Vec<rustls_pki_types::CertificateDer<'static>>,
) -> Outcome<Arc<rustls::ClientConfig>> {
    let mut roots = rustls::RootCertStore::empty();
    for authority in authorities {
        roots.add(authority)?;
    }
    let mut config = rustls::ClientConfig::builder().with_root_certificates(roots).with_no_client_auth();
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(Arc::new(config))
}
