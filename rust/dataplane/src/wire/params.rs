//! The typed parameters that a route's pattern found in a path, as they travel behind a request's headers.
//!
//! `kind u8, name_len u8, value_len u32, name, value` each, the value percent-decoded. The proxy has matched the text; what
//! reads them only has to convert it.

use super::{Cursor, WireError};

/// What a parameter's text stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// Itself.
    Text = 0,
    /// Decimal digits, of any number.
    Int = 1,
    /// Decimal digits, with or without a fraction.
    Float = 2,
    /// 32 hexadecimal digits, with or without hyphens.
    Uuid = 3,
}

/// One parameter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Param<'a> {
    /// How to read `value`.
    pub kind: Kind,
    /// As the pattern has it, at most 255 bytes.
    pub name: &'a [u8],
    /// What stood in the path.
    pub value: &'a [u8],
}

/// Appends a parameter; a pattern has no name that is too long, and a head no such value.
pub fn put_param(out: &mut Vec<u8>, param: Param<'_>) {
    let name = &param.name[..param.name.len().min(usize::from(u8::MAX))];
    out.extend_from_slice(&[param.kind as u8, name.len() as u8]);
    out.extend_from_slice(&(param.value.len() as u32).to_le_bytes());
    out.extend_from_slice(name);
    out.extend_from_slice(param.value);
}

/// Checks the parameters that a request's headers end before, and says where they begin and end.
pub(super) fn params_at(payload: &[u8], headers_end: u32) -> Result<(u32, u32), WireError> {
    let mut at = Cursor { bytes: payload, at: headers_end as usize, what: "path parameters" };
    let len = at.u32()?;
    let start = at.at;
    let end = start + at.take(len as usize)?.len();
    let mut at = Cursor { bytes: &payload[..end], at: start, what: "path parameters" };
    while at.at < end {
        let (_, name, value) = (at.u8()?, at.u8()?, at.u32()?);
        at.take(usize::from(name))?;
        at.take(value as usize)?;
    }
    Ok((start as u32, end as u32))
}

/// Goes through parameters whose lengths were checked.
#[derive(Debug, Clone)]
pub struct Params<'a> {
    pub(super) bytes: &'a [u8],
}

impl<'a> Iterator for Params<'a> {
    type Item = Param<'a>;

    fn next(&mut self) -> Option<Self::Item> {
        let ([kind, name, a, b, c, d], rest) = self.bytes.split_first_chunk::<6>()?;
        let (name, rest) = rest.split_at_checked(usize::from(*name))?;
        let (value, rest) = rest.split_at_checked(u32::from_le_bytes([*a, *b, *c, *d]) as usize)?;
        self.bytes = rest;
        let kind = match kind {
            1 => Kind::Int,
            2 => Kind::Float,
            3 => Kind::Uuid,
            _ => Kind::Text,
        };
        Some(Param { kind, name, value })
    }
}
