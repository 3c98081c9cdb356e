//! TLS of our own listeners: certificate and key from files, re-read when they change.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use arc_swap::ArcSwap;
use rustls::ServerConfig;
use rustls::server::ResolvesServerCert;
use rustls::sign::CertifiedKey;
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};

use crate::config::SecretRef;

/// Why TLS can't be set up.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct TlsError(pub String);

/// A certificate and key that can be replaced while they are in use.
#[derive(Debug)]
pub struct OwnCertificate(ArcSwap<CertifiedKey>);

impl ResolvesServerCert for OwnCertificate {
    fn resolve(&self, _: rustls::server::ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.0.load_full())
    }
}

impl OwnCertificate {
    /// From a chain and a key.
    pub fn new(chain: Vec<CertificateDer<'static>>, key: PrivateKeyDer<'static>) -> Result<Arc<Self>, TlsError> {
        Ok(Arc::new(Self(ArcSwap::from_pointee(certified(chain, key)?))))
    }
    /// Replaces both.
    pub fn replace(&self, chain: Vec<CertificateDer<'static>>, key: PrivateKeyDer<'static>) -> Result<(), TlsError> {
        self.0.store(Arc::new(certified(chain, key)?));
        Ok(())
    }
    /// From files.
    pub fn load(cert: &Path, key: &SecretRef, base: &Path) -> Result<Arc<Self>, TlsError> {
        let (chain, key) = read(cert, key, base)?;
        Self::new(chain, key)
    }
    /// Reads the files again, for example after a renewal.
    pub fn reload(&self, cert: &Path, key: &SecretRef, base: &Path) -> Result<(), TlsError> {
        let (chain, key) = read(cert, key, base)?;
        self.replace(chain, key)
    }
}

fn read(
    cert: &Path,
    key: &SecretRef,
    base: &Path,
) -> Result<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>), TlsError> {
    let path: PathBuf = base.join(cert);
    let bad = |what: &str| TlsError(format!("listen.tls_cert {}: {what}", path.display()));
    let chain = CertificateDer::pem_file_iter(&path)
        .and_then(Iterator::collect::<Result<Vec<_>, _>>)
        .map_err(|_| bad("no PEM certificates can be read there"))?;
    if chain.is_empty() {
        return Err(bad("it holds no certificate"));
    }
    let key = key.read(base).map_err(|e| TlsError(format!("listen.tls_key: {e}")))?;
    let key = PrivateKeyDer::from_pem_slice(key.expose().as_bytes())
        .map_err(|_| TlsError("listen.tls_key: no PEM private key can be read there".to_owned()))?;
    Ok((chain, key))
}

fn certified(chain: Vec<CertificateDer<'static>>, key: PrivateKeyDer<'static>) -> Result<CertifiedKey, TlsError> {
    let provider = rustls::crypto::aws_lc_rs::default_provider();
    CertifiedKey::from_der(chain, key, &provider)
        .map_err(|e| TlsError(format!("the certificate and the private key can't be used together: {e}")))
}

/// The configuration of a listener without client certificates.
pub fn server_config(certificate: Arc<OwnCertificate>) -> Result<Arc<ServerConfig>, TlsError> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|e| TlsError(e.to_string()))?
        .with_no_client_auth()
        .with_cert_resolver(certificate);
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(Arc::new(config))
}
