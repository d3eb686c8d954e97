//! Waiting for what must become true, with an end.

use std::time::Duration;

use anyhow::{Result, bail};
use kvasir_client::{ClientConfig, StoreClient};
use tokio::time::{Instant, sleep};

/// Asks `holds` until it says yes.
///
/// # Errors
/// When it did not within `patience`; `what` is what was waited for.
pub async fn eventually(what: &str, patience: Duration, mut holds: impl AsyncFnMut() -> Result<bool>) -> Result<()> {
    let begun = Instant::now();
    while !holds().await? {
        if begun.elapsed() > patience {
            bail!("not within {patience:?}: {what}");
        }
        sleep(Duration::from_millis(20)).await;
    }
    Ok(())
}

/// Waits until a store holds at least `blocks` whole blocks and has synced all that it took.
///
/// # Errors
/// When it does not come to that within half a minute.
pub async fn until_durable(store_url: &str, blocks: u64) -> Result<()> {
    let client = StoreClient::new(ClientConfig::to(store_url))?;
    let what = format!("{blocks} blocks, synced");
    eventually(&what, Duration::from_secs(30), async || {
        let stat = client.stat().await?;
        Ok(stat.blocks >= blocks && stat.flush_queue_blocks == 0)
    })
    .await
}
