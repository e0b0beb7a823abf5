//! Who a client is when it came through a proxy that is trusted: `X-Forwarded-For` and `X-Forwarded-Proto` as uvicorn
//! reads them in Ray Serve, where `FORWARDED_ALLOW_IPS` names the trusted ones.

use std::net::IpAddr;

use http::HeaderValue;
use ipnet::IpNet;

/// Addresses, networks and names of proxies that are believed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Trusted {
    All,
    These(Vec<Peer>),
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Peer {
    Address(IpAddr),
    Network(IpNet),
    /// What is no address can still stand in `X-Forwarded-For`.
    Name(String),
}

impl Trusted {
    /// From a list with commas, or `*`.
    pub(super) fn parse(list: &str) -> Self {
        if list == "*" {
            return Self::All;
        }
        Self::These(list.split(',').map(|item| Peer::parse(item.trim())).collect())
    }

    pub(super) fn has(&self, host: &str) -> bool {
        let Self::These(peers) = self else { return true };
        let address: Option<IpAddr> = host.parse().ok();
        peers.iter().any(|peer| match (peer, address) {
            (Peer::Address(known), Some(address)) => *known == address,
            (Peer::Network(network), Some(address)) => network.contains(&address),
            (Peer::Name(name), None) => name == host,
            _ => false,
        })
    }

    /// The last one in the list that is not trusted: each proxy has appended whom it saw.
    fn client(&self, list: &str) -> (String, u16) {
        let mut hosts = list.split(',').map(|item| split_port(item.trim()));
        let untrusted = match self {
            Self::All => None,
            Self::These(_) => hosts.clone().rfind(|(host, _)| !self.has(host)),
        };
        let (host, port) = untrusted.or_else(|| hosts.next()).unwrap_or_default();
        (host.to_owned(), port)
    }
}

impl Peer {
    /// A network whose address has bits beyond its prefix is none.
    fn parse(item: &str) -> Self {
        match (item.parse(), item.parse::<IpNet>()) {
            (Ok(address), _) => Self::Address(address),
            (_, Ok(network)) if network.addr() == network.network() => Self::Network(network),
            _ => Self::Name(item.to_owned()),
        }
    }
}

/// `host`, `host:port` or `[host]:port`; a port that is none is 0.
fn split_port(item: &str) -> (&str, u16) {
    if let Some((host, rest)) = item.strip_prefix('[').and_then(|inner| inner.split_once(']')) {
        return (host, rest.strip_prefix(':').and_then(|port| port.parse().ok()).unwrap_or(0));
    }
    match item.split_once(':') {
        Some((host, port)) if !item.starts_with('[') => port.parse().map_or((item, 0), |port| (host, port)),
        _ => (item, 0),
    }
}

/// What trusted headers say of a request.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Forwarded {
    pub(super) https: bool,
    pub(super) client: Option<(String, u16)>,
}

impl Forwarded {
    /// `proto`: the last header of that name; `hops`: all of theirs.
    pub(super) fn read<'h>(
        trusted: &Trusted,
        proto: Option<&HeaderValue>,
        hops: impl Iterator<Item = &'h HeaderValue>,
    ) -> Self {
        let https = proto.is_some_and(|value| value.as_bytes().trim_ascii() == b"https");
        let list = hops.map(latin1).collect::<Vec<_>>();
        let client = (!list.is_empty()).then(|| trusted.client(&list.join(", ")));
        Self { https, client: client.filter(|(host, _)| !host.is_empty()) }
    }
}

fn latin1(value: &HeaderValue) -> String {
    value.as_bytes().iter().map(|byte| char::from(*byte)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn client(trusted: &str, list: &str) -> (String, u16) {
        Trusted::parse(trusted).client(list)
    }

    #[test]
    fn the_last_hop_that_is_not_trusted_is_the_client() {
        for (trusted, list, host, port) in [
            ("127.0.0.1", "1.2.3.4", "1.2.3.4", 0),
            ("127.0.0.1", "6.6.6.6, 1.2.3.4:99, 127.0.0.1", "1.2.3.4", 99),
            ("127.0.0.1,10.0.0.0/8", "1.2.3.4,10.9.8.7", "1.2.3.4", 0),
            ("*", "6.6.6.6, 1.2.3.4", "6.6.6.6", 0),
            ("10.0.0.0/8", "10.1.1.1, 10.2.2.2", "10.1.1.1", 0),
            ("::1", "[2001:db8::1]:443, ::1", "2001:db8::1", 443),
            ("::1", "2001:db8::1", "2001:db8::1", 0),
            ("lb, 127.0.0.1", "unknown, lb", "unknown", 0),
            ("127.0.0.1", "1.2.3.4:port", "1.2.3.4:port", 0),
            ("127.0.0.1", "[::2", "[::2", 0),
        ] {
            assert_eq!(client(trusted, list), (host.to_owned(), port), "{trusted} {list}");
        }
    }

    #[test]
    fn networks_are_those_without_further_bits() {
        let trusted = Trusted::parse("10.0.0.1/8, fd00::/8, 0.0.0.0/33, 192.168.0.0/16");
        let known = ["10.0.0.1", "10.2.0.0", "fd12::1", "fe80::1", "192.168.9.9"].map(|host| trusted.has(host));
        assert_eq!(known, [false, false, true, false, true]);
        assert!(Trusted::parse("0.0.0.0/0").has("8.8.8.8"));
    }
}
