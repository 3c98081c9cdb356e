//! The conformance suite on the memory store and the embedded one.

use std::sync::Arc;

use async_trait::async_trait;

use super::conformance::{self, House};
use super::{Store, embedded, memory};

#[derive(Default)]
struct MemoryHouse(memory::MemoryLog);

#[async_trait]
impl House for MemoryHouse {
    async fn open(&self) -> Arc<dyn Store> {
        Arc::new(memory::reopen(self.0.clone()).expect("what was written can be read"))
    }
}

struct EmbeddedHouse(tempfile::TempDir);

impl Default for EmbeddedHouse {
    fn default() -> Self {
        Self(tempfile::tempdir().expect("a folder for the test"))
    }
}

#[async_trait]
impl House for EmbeddedHouse {
    async fn open(&self) -> Arc<dyn Store> {
        let clock = Arc::new(crate::time::SystemClock);
        let (store, report) = embedded::open(self.0.path(), clock, None, Vec::new()).expect("the store opens");
        assert_eq!((report.rebuilt, report.cut), (None, None));
        Arc::new(store)
    }
}

mod on_memory {
    use super::*;
    use conformance::suite;
    suite!(MemoryHouse);
    #[test]
    fn histories() {
        conformance::histories::run::<MemoryHouse>(60, 120);
    }
}

mod on_embedded {
    use super::*;
    use conformance::suite;
    suite!(EmbeddedHouse);
    #[test]
    fn histories() {
        conformance::histories::run::<EmbeddedHouse>(12, 80);
    }
}
