//! Passwords with their verifiers, made ahead: a verifier takes thousands of rounds, and no request should wait for them on a thread
//! that serves others too. Each is handed out once and wiped when it is dropped.

use std::num::NonZeroU32;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;

use super::scram::{NoRandomness, draw_password, verifier};
use crate::core::secret::Secret;

/// So many are kept.
const SPARES: usize = 32;

/// A password and what PostgreSQL stores to check it.
pub struct Password {
    /// For the agent.
    pub secret: Secret,
    /// For the target.
    pub verifier: String,
}

/// Those that are kept.
pub struct Spares {
    iterations: NonZeroU32,
    kept: Mutex<Vec<Password>>,
    filling: AtomicBool,
}

impl Spares {
    /// None yet: a target that nobody asks for costs nothing.
    pub fn new(iterations: NonZeroU32) -> Arc<Self> {
        Arc::new(Self { iterations, kept: Mutex::default(), filling: AtomicBool::new(false) })
    }

    /// One that nobody else gets. Made now if none is kept.
    pub async fn take(self: &Arc<Self>) -> Result<Password, NoRandomness> {
        let spare = self.kept.lock().pop();
        if !self.filling.swap(true, Ordering::AcqRel) {
            let spares = Arc::clone(self);
            tokio::task::spawn_blocking(move || spares.fill());
        }
        match spare {
            Some(spare) => Ok(spare),
            None => {
                let iterations = self.iterations;
                tokio::task::spawn_blocking(move || make(iterations)).await.map_err(|_| NoRandomness)?
            }
        }
    }

    fn fill(&self) {
        while self.kept.lock().len() < SPARES {
            let Ok(spare) = make(self.iterations) else { break };
            self.kept.lock().push(spare);
        }
        self.filling.store(false, Ordering::Release);
    }
}

fn make(iterations: NonZeroU32) -> Result<Password, NoRandomness> {
    let secret = draw_password()?;
    let verifier = verifier(&secret, iterations)?;
    Ok(Password { secret, verifier })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[tokio::test]
    async fn each_is_handed_out_once_and_some_are_kept() {
        let spares = Spares::new(NonZeroU32::MIN);
        let (mut passwords, mut verifiers) = (BTreeSet::new(), BTreeSet::new());
        for _ in 0..SPARES * 3 {
            let one = spares.take().await.unwrap();
            assert!(one.verifier.starts_with("SCRAM-SHA-256$1:"));
            passwords.insert(one.secret.expose().to_owned());
            verifiers.insert(one.verifier);
        }
        assert_eq!((passwords.len(), verifiers.len()), (SPARES * 3, SPARES * 3));
        while spares.kept.lock().len() < SPARES - 1 {
            let _ = spares.take().await.unwrap();
            tokio::task::yield_now().await;
        }
    }
}
