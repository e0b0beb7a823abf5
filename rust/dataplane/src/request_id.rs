//! The ids of requests that come without one: random UUIDs of version 4.

/// Makes ids; each maker is seeded by the operating system, so that no two make the same.
#[derive(Debug)]
pub struct RequestIds {
    random: fastrand::Rng,
}

impl Default for RequestIds {
    fn default() -> Self {
        let mut seed = [0; 8];
        getrandom::fill(&mut seed).expect("the operating system has random bytes");
        Self { random: fastrand::Rng::with_seed(u64::from_ne_bytes(seed)) }
    }
}

impl RequestIds {
    /// A new id.
    pub fn make(&mut self) -> String {
        uuid(self.random.u128(..)).into_iter().map(char::from).collect()
    }
}

/// The UUID of these random bits: lower-case hexadecimal digits and hyphens.
pub(crate) fn uuid(random: u128) -> [u8; 36] {
    const HEX: &[u8; 16] = b"0123456789abcdef";
    /// Where the two digits of each byte stand.
    const PLACES: [usize; 16] = [0, 2, 4, 6, 9, 11, 14, 16, 19, 21, 24, 26, 28, 30, 32, 34];
    let bits = random & !(0xf << 76) & !(0x3 << 62) | 0x4 << 76 | 0x2 << 62;
    let mut text = [b'-'; 36];
    for (byte, place) in bits.to_be_bytes().into_iter().zip(PLACES) {
        text[place] = HEX[usize::from(byte >> 4)];
        text[place + 1] = HEX[usize::from(byte & 0xf)];
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_differ_and_are_uuids_of_version_4() {
        let mut ids = RequestIds::default();
        let made: std::collections::HashSet<_> = (0..100).map(|_| ids.make()).collect();
        assert_eq!(made.len(), 100);
        for id in made {
            let hyphens: Vec<_> = id.match_indices('-').map(|(at, _)| at).collect();
            assert_eq!((id.len(), hyphens), (36, vec![8, 13, 18, 23]));
            assert!(id[14..].starts_with('4') && id[19..].starts_with(['8', '9', 'a', 'b']), "{id}");
        }
    }
}
