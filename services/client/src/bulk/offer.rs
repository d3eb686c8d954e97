//! What a store says about its faster paths.

use std::{
    net::{SocketAddr, ToSocketAddrs},
    path::PathBuf,
};

use kvasir_proto::{bulk::TOKEN_BYTES, v1};

/// The faster paths of one start of a store.
#[derive(Clone, PartialEq, Eq)]
pub struct BulkOffer {
    /// The bulk TCP listener.
    pub address: Option<SocketAddr>,
    /// The Unix socket, where the store may be on this machine.
    pub local_socket: Option<PathBuf>,
    /// The epoch of that start.
    pub epoch: u64,
    pub(crate) token: [u8; TOKEN_BYTES],
}

impl BulkOffer {
    /// The offer of a store that was asked by other means than this client.
    pub const fn tcp(address: SocketAddr, epoch: u64, token: [u8; TOKEN_BYTES]) -> Self {
        Self {
            address: Some(address),
            local_socket: None,
            epoch,
            token,
        }
    }

    /// The offer in a reply of the store at `url`; `None` where there is none.
    ///
    /// # Errors
    /// What about it cannot be.
    pub(crate) fn of(offer: Option<&v1::BulkOffer>, epoch: u64, url: &str) -> Result<Option<Self>, String> {
        let Some(offer) = offer else { return Ok(None) };
        let token = offer.token[..]
            .try_into()
            .map_err(|_| format!("bulk.token has {} bytes instead of {TOKEN_BYTES}", offer.token.len()))?;
        let address = match offer.address.as_str() {
            "" => None,
            text => {
                let address: SocketAddr = text
                    .parse()
                    .map_err(|_| format!("bulk.address {text:?} is no host and port"))?;
                Some(reachable(address, url))
            }
        };
        let local_socket = (!offer.local_socket.is_empty()).then(|| PathBuf::from(&offer.local_socket));
        Ok(Some(Self {
            address,
            local_socket,
            epoch,
            token,
        }))
    }
}

/// The address, with the host of `url` where it says "any".
fn reachable(mut address: SocketAddr, url: &str) -> SocketAddr {
    if address.ip().is_unspecified() {
        let authority = url.split_once("://").map_or(url, |(_, rest)| rest);
        let authority = authority.split('/').next().unwrap_or(authority);
        // A URL that names a host by name is resolved as the channel resolves it: the first address.
        if let Some(host) = authority.to_socket_addrs().ok().and_then(|mut found| found.next()) {
            address.set_ip(host.ip());
        }
    }
    address
}

/// Without the token: logs are read by others than the store's clients.
impl std::fmt::Debug for BulkOffer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("BulkOffer")
            .field("address", &self.address)
            .field("local_socket", &self.local_socket)
            .field("epoch", &self.epoch)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn offers_are_checked_and_any_host_is_the_urls() {
        let offer = |address: &str, token: usize| v1::BulkOffer {
            address: address.to_owned(),
            token: vec![7; token].into(),
            local_socket: String::new(),
        };
        let table = [
            (offer("127.0.0.1:7402", 16), Ok(Some("127.0.0.1:7402"))),
            (offer("0.0.0.0:7402", 16), Ok(Some("10.1.2.3:7402"))),
            (offer("[::]:7402", 16), Ok(Some("10.1.2.3:7402"))),
            (offer("", 16), Ok(None)),
            (offer("", 15), Err("bulk.token has 15 bytes instead of 16")),
            (
                offer("nowhere", 16),
                Err("bulk.address \"nowhere\" is no host and port"),
            ),
        ];
        for (offer, expected) in table {
            let read = BulkOffer::of(Some(&offer), 5, "http://10.1.2.3:7401/");
            match expected {
                Ok(address) => {
                    let read = read.expect("an offer").expect("an offer");
                    assert_eq!(read.address.map(|address| address.to_string()).as_deref(), address);
                    assert!(!format!("{read:?}").contains("token"), "not for logs");
                }
                Err(problem) => assert_eq!(read, Err(problem.to_owned())),
            }
        }
        assert_eq!(BulkOffer::of(None, 5, "http://10.1.2.3:7401"), Ok(None));
    }
}
