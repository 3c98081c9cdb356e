//! "My agent may work as long as it likes. One that asks again and again is told to slow down."

#[path = "support/house.rs"]
mod house;
#[path = "support/mod.rs"]
mod support;

use std::sync::Arc;

use countersign::broker::BrokerError;
use countersign::store::memory;
use house::{House, Moved};

#[tokio::test]
async fn signs_of_life_are_no_requests_and_too_many_requests_are_denied() {
    let house = House::open(memory::store(), Arc::new(Moved::default())).await;
    let agent = house.agent();
    let id = house.asked("api/notes", 300).await;
    for _ in 0..201 {
        // As the server counts every call; it may say "slow down", policy must not.
        let _ = house.broker.admit(&agent.id);
        house.broker.heartbeat(&agent, id).await.unwrap();
    }
    house.collect(id).await.unwrap();
    let another = house.asked("api/notes", 300).await;
    house.collect(another).await.unwrap();
    assert_eq!(house.word(house.asked("api/customers", 300).await).await, "pending");
    let mut denied = None;
    for n in 4..=210 {
        match house.ask("api/notes", 300).await {
            Ok(id) => house.complete(id).await,
            Err(BrokerError::Denied { rule, .. }) => {
                denied = Some((n, rule));
                break;
            }
            Err(other) => panic!("{other:?}"),
        }
    }
    assert_eq!(denied, Some((201, "never-runaway".to_owned())));
}
