//! TLS towards the broker: its certificate is verified with the CA that `COUNTERSIGN_CA` names, or with the system's.

use std::path::Path;
use std::sync::Arc;

use rustls::{ClientConfig, RootCertStore};
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;

use super::ClientError;
use crate::identity::spiffe::Svid;

/// An HTTP client that speaks to one broker. With an SVID, it proves itself by mutual TLS.
pub fn http(ca: Option<&Path>, svid: Option<&Svid>) -> Result<reqwest::Client, ClientError> {
    let builder = reqwest::Client::builder()
        .redirect(reqwest::redirect::Policy::none())
        .connect_timeout(std::time::Duration::from_secs(10))
        .no_proxy();
    let fail = |e: reqwest::Error| ClientError::Settings(format!("TLS can't be set up: {e}"));
    let Some(ca) = ca else {
        if svid.is_some() {
            let what = "a client certificate needs COUNTERSIGN_CA, the CA that signed the broker's certificate";
            return Err(ClientError::Settings(what.to_owned()));
        }
        return builder.build().map_err(fail);
    };
    let mut roots = RootCertStore::empty();
    let certs = CertificateDer::pem_file_iter(ca)
        .and_then(Iterator::collect::<Result<Vec<_>, _>>)
        .map_err(|e| ClientError::Settings(format!("COUNTERSIGN_CA {}: {e}", ca.display())))?;
    for cert in certs {
        roots.add(cert).map_err(|e| ClientError::Settings(format!("COUNTERSIGN_CA {}: {e}", ca.display())))?;
    }
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|e| ClientError::Settings(e.to_string()))?
        .with_root_certificates(roots);
    let config = match svid {
        None => config.with_no_client_auth(),
        Some(svid) => config
            .with_client_auth_cert(svid.chain.clone(), svid.key.clone_key())
            .map_err(|e| ClientError::Settings(format!("the SVID can't be used: {e}")))?,
    };
    builder.tls_backend_preconfigured(config).build().map_err(fail)
}
