//! TLS for the agents' listener: client certificates are mandatory and are SVIDs; nothing is resumed, so no session
//! carries an identity past the end of its bundle (regression A10).

use std::sync::Arc;

use parking_lot::Mutex;
use rustls::client::danger::HandshakeSignatureValid;
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{ClientHello, NoServerSessionStorage, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use rustls::time_provider::TimeProvider;
use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, Error, OtherError, ServerConfig, SignatureScheme,
};
use rustls_pki_types::{CertificateDer, UnixTime};
use tokio::sync::watch;

use super::error::{IdentityError, Refusal};
use super::spiffe::Svid;
use super::svid::SpiffeVerifier;
use crate::core::id::Timestamp;
use crate::time::Clock;

/// Our clock, where rustls asks for the time.
struct ClockTime(Arc<dyn Clock>);

impl std::fmt::Debug for ClockTime {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ClockTime")
    }
}

impl TimeProvider for ClockTime {
    fn current_time(&self) -> Option<UnixTime> {
        Some(UnixTime::since_unix_epoch(std::time::Duration::from_millis(self.0.wall().0)))
    }
}

/// Asks the [`SpiffeVerifier`] in the handshake. The same question is asked again for each request.
#[derive(Debug)]
struct SvidClients {
    verifier: Arc<SpiffeVerifier>,
    provider: Arc<rustls::crypto::CryptoProvider>,
}

impl ClientCertVerifier for SvidClients {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        // No hints: the authorities change while the listener lives.
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        let chain: Vec<CertificateDer<'_>> =
            std::iter::once(end_entity).chain(intermediates).map(|c| CertificateDer::from_slice(c)).collect();
        match self.verifier.agent_from_certificate(&chain, Timestamp(now.as_secs().saturating_mul(1000))) {
            Ok(_) => Ok(ClientCertVerified::assertion()),
            Err(e) => Err(Error::InvalidCertificate(match e.refusal() {
                Refusal::Expired => CertificateError::Expired,
                Refusal::NotYetValid => CertificateError::NotValidYet,
                Refusal::UnknownIssuer => CertificateError::UnknownIssuer,
                _ => CertificateError::Other(OtherError(Arc::new(e))),
            })),
        }
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        // TLS 1.2 is not offered on this listener.
        Err(Error::General("TLS 1.3 only".into()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        rustls::crypto::verify_tls13_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

/// Our own certificate as it is now: an SVID that rotates under a listener that stays. Without one, handshakes fail.
pub struct OwnSvid {
    svid: watch::Receiver<Option<Arc<Svid>>>,
    made: Mutex<Option<(Arc<Svid>, Arc<CertifiedKey>)>>,
}

impl std::fmt::Debug for OwnSvid {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("OwnSvid")
    }
}

impl OwnSvid {
    /// Serves what `svid` holds: see [`watch_svid`](super::spiffe::watch_svid).
    pub const fn new(svid: watch::Receiver<Option<Arc<Svid>>>) -> Self {
        Self { svid, made: Mutex::new(None) }
    }

    fn current(&self) -> Option<Arc<CertifiedKey>> {
        let svid = self.svid.borrow().clone()?;
        let mut made = self.made.lock();
        if let Some((of, key)) = &*made
            && Arc::ptr_eq(of, &svid)
        {
            return Some(Arc::clone(key));
        }
        match CertifiedKey::from_der(svid.chain.clone(), svid.key.clone_key(), &super::crypto_provider()) {
            Ok(key) => {
                let key = Arc::new(key);
                *made = Some((svid, Arc::clone(&key)));
                Some(key)
            }
            Err(error) => {
                tracing::error!(%error, "our own SVID can't be served");
                None
            }
        }
    }
}

impl ResolvesServerCert for OwnSvid {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        self.current()
    }
}

/// The configuration of the listener for X.509-SVIDs: TLS 1.3, no tickets, no session storage, no early data.
/// `server_cert` may change what it hands out at any time (an SVID rotates).
pub fn mtls_server_config(
    verifier: Arc<SpiffeVerifier>,
    server_cert: Arc<dyn ResolvesServerCert>,
    clock: Arc<dyn Clock>,
) -> Result<ServerConfig, IdentityError> {
    let provider = super::crypto_provider();
    let clients = Arc::new(SvidClients { verifier, provider: Arc::clone(&provider) });
    let builder = ServerConfig::builder_with_details(provider, Arc::new(ClockTime(clock)))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(|e| IdentityError::new(Refusal::Configuration, format!("TLS: {e}")))?;
    let mut config = builder.with_client_cert_verifier(clients).with_cert_resolver(server_cert);
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    config.max_early_data_size = 0;
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(config)
}
