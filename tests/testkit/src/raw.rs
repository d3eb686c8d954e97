//! Bytes that no client library would send.

use std::{net::SocketAddr, time::Duration};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};

/// How a peer took raw bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RawAnswer {
    /// It said something (perhaps nothing) and closed the connection.
    Closed(Vec<u8>),
    /// It kept the connection open and waits for more; what it said so far.
    Waits(Vec<u8>),
}

/// Sends `bytes`, closes the sending half where `half_close`, and reads until the peer closes or is silent for `patience`.
///
/// # Errors
/// When the connection cannot be made. A peer that cuts it while we write is an answer.
pub async fn send_raw(
    addr: SocketAddr,
    bytes: &[u8],
    half_close: bool,
    patience: Duration,
) -> std::io::Result<RawAnswer> {
    let mut stream = TcpStream::connect(addr).await?;
    let mut heard = Vec::new();
    if stream.write_all(bytes).await.is_err() || (half_close && stream.shutdown().await.is_err()) {
        return Ok(RawAnswer::Closed(heard));
    }
    let mut buffer = [0; 4096];
    loop {
        match timeout(patience, stream.read(&mut buffer)).await {
            Err(_) => return Ok(RawAnswer::Waits(heard)),
            Ok(Ok(0) | Err(_)) => return Ok(RawAnswer::Closed(heard)),
            Ok(Ok(count)) => heard.extend_from_slice(&buffer[..count]),
        }
    }
}
