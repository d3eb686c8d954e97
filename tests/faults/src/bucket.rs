//! A real S3 server over a folder, in this process, that checks signatures.

use std::net::SocketAddr;

use anyhow::{Context, Result};
use hyper_util::{
    rt::{TokioExecutor, TokioIo},
    server::conn::auto::Builder as Connections,
};
use s3s::{auth::SimpleAuth, service::S3ServiceBuilder};
use tempfile::TempDir;
use tokio::{net::TcpListener, task::JoinHandle};

pub(crate) const KEY_ID: &str = "FAULTS";
pub(crate) const SECRET: &str = "a secret that guards nothing";
pub(crate) const BUCKET: &str = "blocks";

/// A running server; it ends when dropped, within the runtime that it was started on.
#[derive(Debug)]
pub(crate) struct Bucket {
    pub(crate) addr: SocketAddr,
    _folder: TempDir,
    serving: JoinHandle<()>,
}

impl Bucket {
    pub(crate) async fn start() -> Result<Self> {
        let folder = tempfile::tempdir()?;
        std::fs::create_dir(folder.path().join(BUCKET))?;
        let files = s3s_fs::FileSystem::new(folder.path())
            .map_err(|error| anyhow::anyhow!("cannot serve {}: {error:?}", folder.path().display()))?;
        let mut service = S3ServiceBuilder::new(files);
        service.set_auth(SimpleAuth::from_single(KEY_ID, SECRET));
        let service = service.build();
        let listener = TcpListener::bind("127.0.0.1:0")
            .await
            .context("a port for the bucket")?;
        let addr = listener.local_addr()?;
        let serving = tokio::spawn(async move {
            let mut connections = tokio::task::JoinSet::new();
            while let Ok((socket, _)) = listener.accept().await {
                let service = service.clone();
                connections.spawn(async move {
                    // A client that goes away in the middle is what this is for.
                    let _ = Connections::new(TokioExecutor::new())
                        .serve_connection(TokioIo::new(socket), service)
                        .await;
                });
                while connections.try_join_next().is_some() {}
            }
        });
        Ok(Self {
            addr,
            _folder: folder,
            serving,
        })
    }
}

impl Drop for Bucket {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(flavor = "multi_thread")]
    async fn it_answers() {
        use tokio::io::{AsyncReadExt, AsyncWriteExt};
        let bucket = Bucket::start().await.expect("a bucket");
        let mut stream = tokio::net::TcpStream::connect(bucket.addr).await.expect("a connection");
        let request = format!("GET /{BUCKET}?list-type=2 HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.expect("a request");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.expect("an answer");
        assert!(
            answer.starts_with("HTTP/1.1 403"),
            "unsigned requests are refused: {answer}"
        );
    }
}
