//! The unmodified `openai` Python package.

use std::path::Path;

use anyhow::Result;
use kvasir_testkit::{Cluster, Options, openai_python};
use tokio::process::Command;

#[tokio::test(flavor = "multi_thread")]
async fn the_openai_package_works() -> Result<()> {
    let cluster = Cluster::start(Options::default()).await?;
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/openai_client.py");
    let output = Command::new(openai_python())
        .arg(script)
        .arg(format!("{}/v1", cluster.router_url()))
        .arg(cluster.file().name())
        .output()
        .await?;
    let (said, complained) = (
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr),
    );
    assert!(output.status.success(), "{said}\n{complained}");
    // Every check of the script was reached.
    assert_eq!(
        said.lines().filter(|line| line.starts_with("ok ")).count(),
        25,
        "{said}"
    );
    cluster.stop().await
}
