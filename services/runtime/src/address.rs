//! Which addresses a service may listen on.

use std::net::SocketAddr;

/// Refused because anyone who reaches the address could use the service.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{key} = \"{addr}\" can be reached from other machines, and this service has no authentication and no encryption yet: \
     use a loopback address such as 127.0.0.1:{}, or set {allow_key} = true if the network around it is trusted",
    .addr.port()
)]
pub struct ExposedAddress {
    /// The configuration key with the address.
    pub key: String,
    /// The configuration key that would allow it.
    pub allow_key: String,
    /// The address.
    pub addr: SocketAddr,
}

/// Passes a loopback address, and any other only when the operator allowed it (`allow_remote`).
///
/// `key` and `allow_key` are the dotted configuration keys, for the message.
pub fn loopback_or_allowed(
    key: &str,
    addr: SocketAddr,
    allow_key: &str,
    allow_remote: bool,
) -> Result<(), ExposedAddress> {
    if addr.ip().to_canonical().is_loopback() || allow_remote {
        return Ok(());
    }
    Err(ExposedAddress {
        key: key.to_owned(),
        allow_key: allow_key.to_owned(),
        addr,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loopback_passes_and_the_rest_needs_leave() {
        let table = [
            ("127.0.0.1:0", false, true),
            ("127.8.0.1:7401", false, true),
            ("[::1]:7401", false, true),
            ("[::ffff:127.0.0.1]:7401", false, true),
            ("0.0.0.0:7401", false, false),
            ("[::]:7401", false, false),
            ("10.0.0.7:7401", false, false),
            ("0.0.0.0:7401", true, true),
        ];
        for (addr, allow, passes) in table {
            let addr = addr.parse().expect("an address");
            let result = loopback_or_allowed("store.listen", addr, "store.allow_remote", allow);
            assert_eq!(result.is_ok(), passes, "{addr} with allow = {allow}");
        }
    }

    #[test]
    fn the_message_says_what_to_do() {
        let addr = "0.0.0.0:7401".parse().expect("an address");
        let error = loopback_or_allowed("store.listen", addr, "store.allow_remote", false).expect_err("exposed");
        let text = error.to_string();
        assert!(text.contains("store.listen = \"0.0.0.0:7401\""), "{text}");
        assert!(text.contains("127.0.0.1:7401"), "{text}");
        assert!(text.contains("store.allow_remote = true"), "{text}");
    }
}
