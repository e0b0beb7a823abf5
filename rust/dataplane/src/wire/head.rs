//! Heads of HTTP requests and responses as they travel: parsed once, by the proxy, and never as raw HTTP.
//!
//! A view owns the payload and keeps offsets, so that a handler which asks for nothing costs nothing beyond one check of
//! the lengths. Names are lower case and valid by the time they are encoded.

use bytes::{BufMut, Bytes, BytesMut};

use super::{Cursor, WireError, params};

const FIXED: usize = 32;
const HTTPS: u8 = 1;
const PARAMS: u8 = 2;

/// What the proxy knows of a request, ready to be written.
#[derive(Debug, Clone, Copy)]
pub struct RequestHead<'a> {
    /// As sent, upper case for the standard ones.
    pub method: &'a [u8],
    /// 10, 11 or 20.
    pub http_version: u8,
    /// The client spoke TLS.
    pub https: bool,
    /// Percent-encoded path without the query.
    pub path: &'a [u8],
    /// Query without the question mark.
    pub query: &'a [u8],
    /// `HTTPOptions.root_path` and the route prefix.
    pub root_path: &'a [u8],
    /// The matched prefix, as metrics and logs name it.
    pub route: &'a [u8],
    /// `x-request-id` as received or made.
    pub request_id: &'a [u8],
    /// The peer's address and port.
    pub client: (&'a [u8], u16),
    /// The listener's address and port.
    pub server: (&'a [u8], u16),
    /// What the route's pattern found in the path, as `params.rs` writes it; empty: nothing.
    pub params: &'a [u8],
}

/// Appends a request head.
///
/// The proxy's limits keep every part within its length field (a method of 255 bytes, 65,535 headers); what is longer all
/// the same is cut, so that the frame stays readable.
pub fn put_request_head<'h, H>(out: &mut BytesMut, head: &RequestHead<'_>, headers: H)
where
    H: Iterator<Item = (&'h [u8], &'h [u8])>,
{
    let cut = |part: &'_ [u8]| part.len().min(usize::from(u16::MAX));
    let head = &RequestHead {
        method: &head.method[..head.method.len().min(usize::from(u8::MAX))],
        root_path: &head.root_path[..cut(head.root_path)],
        route: &head.route[..cut(head.route)],
        request_id: &head.request_id[..cut(head.request_id)],
        ..*head
    };
    let start = out.len();
    out.reserve(FIXED + head.path.len() + head.query.len() + 1024);
    out.put_u8(head.method.len() as u8);
    out.put_u8(head.http_version);
    out.put_u8(if head.https { HTTPS } else { 0 } | if head.params.is_empty() { 0 } else { PARAMS });
    out.put_u8(0);
    out.put_u16_le(head.root_path.len() as u16);
    out.put_u16_le(head.route.len() as u16);
    out.put_u16_le(head.request_id.len() as u16);
    out.put_u16_le(head.client.0.len() as u16);
    out.put_u16_le(head.client.1);
    out.put_u16_le(head.server.0.len() as u16);
    out.put_u16_le(head.server.1);
    out.put_u16_le(0);
    out.put_u32_le(head.path.len() as u32);
    out.put_u32_le(head.query.len() as u32);
    out.put_u32_le(0);
    for part in
        [head.method, head.path, head.query, head.root_path, head.route, head.request_id, head.client.0, head.server.0]
    {
        out.put_slice(part);
    }
    let (count, len) = put_headers(out, headers);
    out[start + 18..start + 20].copy_from_slice(&count.to_le_bytes());
    out[start + 28..start + 32].copy_from_slice(&len.to_le_bytes());
    if !head.params.is_empty() {
        out.put_u32_le(head.params.len() as u32);
        out.put_slice(head.params);
    }
}

/// Appends a response head.
pub fn put_response_head<'h, H>(out: &mut BytesMut, headers: H)
where
    H: Iterator<Item = (&'h [u8], &'h [u8])>,
{
    let start = out.len();
    out.put_bytes(0, 8);
    let (count, len) = put_headers(out, headers);
    out[start..start + 2].copy_from_slice(&count.to_le_bytes());
    out[start + 4..start + 8].copy_from_slice(&len.to_le_bytes());
}

/// Appends headers and returns how many there are and how long they are.
fn put_headers<'h>(out: &mut BytesMut, headers: impl Iterator<Item = (&'h [u8], &'h [u8])>) -> (u16, u32) {
    let start = out.len();
    let mut count = 0;
    for (name, value) in headers {
        out.put_u16_le(name.len() as u16);
        out.put_u32_le(value.len() as u32);
        out.put_slice(name);
        out.put_slice(value);
        count += 1;
    }
    (count, (out.len() - start) as u32)
}

/// A request head as the replica sees it: the payload and where its parts end.
#[derive(Debug, Clone)]
pub struct RequestHeadView {
    payload: Bytes,
    /// Ends of method, path, query, `root_path`, route, request id, client, server, headers.
    ends: [u32; 9],
    /// Where the path parameters begin and end.
    params: (u32, u32),
    /// 10, 11 or 20.
    pub http_version: u8,
    /// The client spoke TLS.
    pub https: bool,
    client_port: u16,
    server_port: u16,
    header_count: u16,
}

impl RequestHeadView {
    /// Checks every length once; the accessors then cannot fail.
    ///
    /// # Errors
    /// [`WireError::Malformed`] when lengths do not add up.
    pub fn parse(payload: Bytes) -> Result<Self, WireError> {
        let mut at = Cursor::new(&payload, "request head");
        let (method, http_version, flags, _) = (at.u8()?, at.u8()?, at.u8()?, at.u8()?);
        let (root_path, route, request_id, client) = (at.u16()?, at.u16()?, at.u16()?, at.u16()?);
        let (client_port, server, server_port, header_count) = (at.u16()?, at.u16()?, at.u16()?, at.u16()?);
        let (path, query, headers) = (at.u32()?, at.u32()?, at.u32()?);
        let lens = [
            u32::from(method),
            path,
            query,
            u32::from(root_path),
            u32::from(route),
            u32::from(request_id),
            u32::from(client),
            u32::from(server),
            headers,
        ];
        let mut ends = [0; 9];
        let mut end = FIXED as u32;
        for (slot, len) in ends.iter_mut().zip(lens) {
            end = end.checked_add(len).ok_or(WireError::Malformed("request head"))?;
            *slot = end;
        }
        if end as usize > payload.len() {
            return Err(WireError::Malformed("request head"));
        }
        check_headers(&payload[ends[7] as usize..end as usize], header_count)?;
        let params = if flags & PARAMS == 0 { (end, end) } else { params::params_at(&payload, end)? };
        let https = flags & HTTPS != 0;
        Ok(Self { payload, ends, params, http_version, https, client_port, server_port, header_count })
    }

    fn part(&self, index: usize) -> &[u8] {
        let start = if index == 0 { FIXED as u32 } else { self.ends[index - 1] };
        &self.payload[start as usize..self.ends[index] as usize]
    }

    /// As sent by the client.
    pub fn method(&self) -> &[u8] {
        self.part(0)
    }

    /// Percent-encoded, without the query.
    pub fn path(&self) -> &[u8] {
        self.part(1)
    }

    /// Without the question mark.
    pub fn query(&self) -> &[u8] {
        self.part(2)
    }

    /// `HTTPOptions.root_path` and the route prefix.
    pub fn root_path(&self) -> &[u8] {
        self.part(3)
    }

    /// The matched prefix.
    pub fn route(&self) -> &[u8] {
        self.part(4)
    }

    /// As received or made by the proxy.
    pub fn request_id(&self) -> &[u8] {
        self.part(5)
    }

    /// Address and port of the client.
    pub fn client(&self) -> (&[u8], u16) {
        (self.part(6), self.client_port)
    }

    /// Address and port that the client reached.
    pub fn server(&self) -> (&[u8], u16) {
        (self.part(7), self.server_port)
    }

    /// How many headers there are.
    pub fn header_count(&self) -> usize {
        usize::from(self.header_count)
    }

    /// Names in lower case and values, in the order of the request.
    pub fn headers(&self) -> Headers<'_> {
        Headers { bytes: self.part(8) }
    }

    /// The head as it travels, without what follows it.
    pub fn encoded(&self) -> &[u8] {
        &self.payload[..self.payload.len() - self.body().len()]
    }

    /// What the route's pattern found in the path, in its order.
    pub fn params(&self) -> params::Params<'_> {
        params::Params { bytes: &self.payload[self.params.0 as usize..self.params.1 as usize] }
    }

    /// What follows the head: the whole body if the frame had FIN.
    pub fn body(&self) -> Bytes {
        self.payload.slice(self.params.1 as usize..)
    }
}

/// A response head as the caller sees it.
#[derive(Debug, Clone)]
pub struct ResponseHeadView {
    payload: Bytes,
    end: usize,
    header_count: u16,
}

impl ResponseHeadView {
    /// Checks every length once; the accessors then cannot fail.
    ///
    /// # Errors
    /// [`WireError::Malformed`] when lengths do not add up.
    pub fn parse(payload: Bytes) -> Result<Self, WireError> {
        let mut at = Cursor::new(&payload, "response head");
        let (header_count, _, len) = (at.u16()?, at.u16()?, at.u32()?);
        check_headers(at.take(len as usize)?, header_count)?;
        let end = at.at;
        Ok(Self { payload, end, header_count })
    }

    /// How many headers there are.
    pub fn header_count(&self) -> usize {
        usize::from(self.header_count)
    }

    /// Names and values in order.
    pub fn headers(&self) -> Headers<'_> {
        Headers { bytes: &self.payload[8..self.end] }
    }

    /// What follows the head.
    pub fn body(&self) -> Bytes {
        self.payload.slice(self.end..)
    }
}

/// The header that names a request's model.
pub const MODEL_HEADER: &[u8] = b"serve_multiplexed_model_id";

/// Whether a header's lower-case name is `key`, which may be written with `-` or `_`: proxies on the way change the one
/// into the other, or drop names with the second.
pub fn is_named(name: &[u8], key: &[u8]) -> bool {
    let plain = |byte: u8| if byte == b'_' { b'-' } else { byte.to_ascii_lowercase() };
    name.len() == key.len() && name.iter().zip(key).all(|(&a, &b)| plain(a) == plain(b))
}

fn check_headers(bytes: &[u8], count: u16) -> Result<(), WireError> {
    let mut at = Cursor::new(bytes, "headers");
    for _ in 0..count {
        let (name, value) = (at.u16()?, at.u32()?);
        at.take(usize::from(name))?;
        at.take(value as usize)?;
    }
    if at.at == bytes.len() { Ok(()) } else { Err(WireError::Malformed("headers")) }
}

/// Goes through headers whose lengths were checked by `parse`.
#[derive(Debug, Clone)]
pub struct Headers<'a> {
    bytes: &'a [u8],
}

impl<'a> Iterator for Headers<'a> {
    type Item = (&'a [u8], &'a [u8]);

    fn next(&mut self) -> Option<Self::Item> {
        let (lens, rest) = self.bytes.split_first_chunk::<6>()?;
        let name = usize::from(u16::from_le_bytes([lens[0], lens[1]]));
        let value = u32::from_le_bytes([lens[2], lens[3], lens[4], lens[5]]) as usize;
        let (name, rest) = rest.split_at_checked(name)?;
        let (value, rest) = rest.split_at_checked(value)?;
        self.bytes = rest;
        Some((name, value))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::wire::params::{Kind, Param, put_param};

    fn some_bytes(max: usize) -> impl Strategy<Value = Vec<u8>> {
        prop::collection::vec(any::<u8>(), 0..max)
    }

    fn some_headers() -> impl Strategy<Value = Vec<(Vec<u8>, Vec<u8>)>> {
        prop::collection::vec((some_bytes(20), some_bytes(40)), 0..12)
    }

    fn some_params() -> impl Strategy<Value = Vec<(Kind, Vec<u8>, Vec<u8>)>> {
        let kind = prop::sample::select(vec![Kind::Text, Kind::Int, Kind::Float, Kind::Uuid]);
        prop::collection::vec((kind, some_bytes(20), some_bytes(40)), 0..4)
    }

    fn pairs(headers: &[(Vec<u8>, Vec<u8>)]) -> impl Iterator<Item = (&[u8], &[u8])> + Clone {
        headers.iter().map(|(name, value)| (&name[..], &value[..]))
    }

    proptest! {
        #[test]
        fn a_request_head_reads_back(
            texts in prop::collection::vec(some_bytes(30), 8),
            (client_port, server_port, https) in any::<(u16, u16, bool)>(),
            headers in some_headers(),
            params in some_params(),
            body in some_bytes(50),
        ) {
            let mut encoded = Vec::new();
            for (kind, name, value) in &params {
                put_param(&mut encoded, Param { kind: *kind, name, value });
            }
            let head = RequestHead {
                method: &texts[0], http_version: 11, https, path: &texts[1], query: &texts[2], root_path: &texts[3],
                route: &texts[4], request_id: &texts[5], client: (&texts[6], client_port), server: (&texts[7], server_port),
                params: &encoded,
            };
            let mut out = BytesMut::new();
            put_request_head(&mut out, &head, pairs(&headers));
            out.extend_from_slice(&body);
            let view = RequestHeadView::parse(out.freeze())?;
            prop_assert_eq!(view.method(), head.method);
            prop_assert_eq!(view.path(), head.path);
            prop_assert_eq!(view.query(), head.query);
            prop_assert_eq!(view.root_path(), head.root_path);
            prop_assert_eq!(view.route(), head.route);
            prop_assert_eq!(view.request_id(), head.request_id);
            prop_assert_eq!(view.client(), head.client);
            prop_assert_eq!(view.server(), head.server);
            prop_assert_eq!((view.https, view.http_version), (https, 11));
            prop_assert_eq!(view.header_count(), headers.len());
            prop_assert!(view.headers().eq(pairs(&headers)));
            let found = view.params().map(|param| (param.kind, param.name.to_vec(), param.value.to_vec()));
            prop_assert_eq!(found.collect::<Vec<_>>(), params);
            prop_assert_eq!(&view.body()[..], &body[..]);
        }

        #[test]
        fn a_response_head_reads_back(headers in some_headers(), body in some_bytes(50)) {
            let mut out = BytesMut::new();
            put_response_head(&mut out, pairs(&headers));
            out.extend_from_slice(&body);
            let view = ResponseHeadView::parse(out.freeze())?;
            prop_assert_eq!(view.header_count(), headers.len());
            prop_assert!(view.headers().eq(pairs(&headers)));
            prop_assert_eq!(&view.body()[..], &body[..]);
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes in some_bytes(200)) {
            if let Ok(view) = RequestHeadView::parse(Bytes::from(bytes.clone())) {
                prop_assert_eq!(view.headers().count(), view.header_count());
                prop_assert!(view.params().last().is_none_or(|it| it.value.as_ptr_range().end == view.body().as_ptr()));
            }
            if let Ok(view) = ResponseHeadView::parse(Bytes::from(bytes)) {
                prop_assert_eq!(view.headers().count(), view.header_count());
            }
        }
    }
}
