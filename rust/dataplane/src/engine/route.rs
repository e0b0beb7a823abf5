//! Which application a path belongs to: the longest prefix on path segments, or a pattern.
//!
//! `/x` matches `/x` and `/x/y`, not `/xy`; `/` matches every path. A look-up is one binary search a segment, whatever the
//! number of prefixes, and allocates nothing. A pattern matches the whole path; of all that match, the route wins whose
//! literal head is longest, and on a tie the pattern, the earlier of two.

use std::{borrow::Cow, cmp::Ordering};

use super::pattern::Pattern;

/// Prefixes and patterns, and what they lead to.
#[derive(Debug)]
pub struct RouteTable<T> {
    /// Sorted by prefix; `/` stands as the empty prefix.
    entries: Vec<(Vec<u8>, T)>,
    /// Those with the longest head first.
    patterns: Vec<(Pattern, T)>,
}

/// Where a path leads.
#[derive(Debug)]
pub struct Match<'t, T> {
    /// What its route leads to.
    pub to: &'t T,
    /// What a pattern found in the path, as it travels; empty: nothing.
    pub params: Vec<u8>,
}

impl<T> Default for RouteTable<T> {
    fn default() -> Self {
        Self { entries: Vec::new(), patterns: Vec::new() }
    }
}

impl<T> RouteTable<T> {
    /// A table of these prefixes; the last of equal ones wins.
    pub fn new(routes: impl IntoIterator<Item = (String, T)>) -> Self {
        let trimmed = |prefix: String| prefix.trim_end_matches('/').as_bytes().to_vec();
        let mut entries: Vec<_> = routes.into_iter().map(|(prefix, to)| (trimmed(prefix), to)).collect();
        entries.reverse();
        entries.sort_by(|(a, _), (b, _)| a.cmp(b));
        entries.dedup_by(|(a, _), (b, _)| a == b);
        Self { entries, patterns: Vec::new() }
    }

    /// The table with these patterns besides, in the order in which they were registered.
    #[must_use]
    pub fn with_patterns(mut self, patterns: impl IntoIterator<Item = (Pattern, T)>) -> Self {
        self.patterns.extend(patterns);
        self.patterns.sort_by_key(|(pattern, _)| std::cmp::Reverse(pattern.head()));
        self
    }

    /// What the route that wins leads to; `path` is percent-decoded.
    pub fn find(&self, path: &[u8]) -> Option<Match<'_, T>> {
        let prefix = self.longest(path);
        for (pattern, to) in &self.patterns {
            if prefix.is_some_and(|(len, _)| len > pattern.head()) {
                break;
            }
            if let Some(params) = pattern.matches(path) {
                return Some(Match { to, params });
            }
        }
        prefix.map(|(_, to)| Match { to, params: Vec::new() })
    }

    /// The length of the longest matching prefix and what it leads to.
    fn longest(&self, path: &[u8]) -> Option<(usize, &T)> {
        if path.first() != Some(&b'/') {
            return None;
        }
        let mut prefix = path;
        loop {
            let search = |(entry, _): &(Vec<u8>, T)| -> Ordering { entry.as_slice().cmp(prefix) };
            if let Ok(at) = self.entries.binary_search_by(search) {
                return Some((prefix.len(), &self.entries[at].1));
            }
            let cut = prefix.iter().rposition(|&byte| byte == b'/')?;
            prefix = &prefix[..cut];
        }
    }
}

/// `path` with `%41` turned into `A`; an escape that is none stays as it is, as in Python's `unquote`.
pub fn decoded(path: &[u8]) -> Cow<'_, [u8]> {
    if !path.contains(&b'%') {
        return Cow::Borrowed(path);
    }
    let hex = |byte: Option<&u8>| byte.and_then(|&byte| char::from(byte).to_digit(16));
    let mut out = Vec::with_capacity(path.len());
    let mut at = 0;
    while let Some(&byte) = path.get(at) {
        if let (b'%', Some(high), Some(low)) = (byte, hex(path.get(at + 1)), hex(path.get(at + 2))) {
            out.push((high * 16 + low) as u8);
            at += 3;
        } else {
            out.push(byte);
            at += 1;
        }
    }
    Cow::Owned(out)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn table(prefixes: &[&str]) -> RouteTable<String> {
        RouteTable::new(prefixes.iter().map(|&prefix| (prefix.to_owned(), prefix.to_owned())))
    }

    fn find<'t>(table: &'t RouteTable<String>, path: &str) -> Option<&'t str> {
        table.find(path.as_bytes()).map(|found| found.to.as_str())
    }

    #[test]
    fn the_longest_prefix_on_segments_wins() {
        let table = table(&["/", "/x", "/x/y", "/xyz"]);
        for (path, prefix) in [
            ("/", "/"),
            ("/a", "/"),
            ("/x", "/x"),
            ("/x/", "/x"),
            ("/xy", "/"),
            ("/x/y", "/x/y"),
            ("/x/y/z", "/x/y"),
            ("/x/yy", "/x"),
            ("/xyz/1", "/xyz"),
            ("//x", "/"),
        ] {
            assert_eq!(find(&table, path), Some(prefix), "{path}");
        }
    }

    #[test]
    fn without_a_root_route_other_paths_match_nothing() {
        let table = table(&["/x"]);
        for path in ["/", "/xy", "/y/x", "*", "", "x"] {
            assert_eq!(find(&table, path), None, "{path}");
        }
    }

    #[test]
    fn of_prefixes_and_patterns_the_longest_literal_head_wins() {
        let patterns = ["/{any}", "/api/{n:int}", "/api/{any}", "/api/v{n:int}", "/exact", "/api/x/{n:int}"];
        let pattern = |text: &str| (Pattern::parse(text).expect("valid"), text.to_owned());
        let table = table(&["/", "/api/x", "/exact"]).with_patterns(patterns.map(pattern));
        for (path, route) in [
            ("/", "/"),
            ("/a", "/{any}"),
            ("/a/b", "/"),
            ("/api/1", "/api/{n:int}"),
            ("/api/one", "/api/{any}"),
            ("/api/v2", "/api/{any}"),
            ("/api/x", "/api/x"),
            ("/api/x/1", "/api/x/{n:int}"),
            ("/api/x/one", "/api/x"),
            ("/exact", "/exact"),
            ("/exact/", "/exact"),
        ] {
            assert_eq!(find(&table, path), Some(route), "{path}");
        }
        assert!(table.find(b"/exact").is_some_and(|found| found.params.is_empty()));
    }

    #[test]
    fn only_whole_escapes_are_decoded() {
        for (raw, plain) in [("/a%20b", "/a b"), ("/%zz%4", "/%zz%4"), ("/%2Fx%2f", "//x/"), ("/%C3%A9", "/é")] {
            assert_eq!(&*decoded(raw.as_bytes()), plain.as_bytes(), "{raw}");
        }
        assert!(matches!(decoded(b"/plain"), Cow::Borrowed(_)));
    }

    proptest! {
        #[test]
        fn a_look_up_agrees_with_the_rule(prefixes in prop::collection::vec("(/[ab]{1,2}){0,3}", 0..6), path in "(/[ab]{0,2}){0,4}") {
            let matches = |prefix: &&String| path.starts_with('/')
                && (path == **prefix || path.starts_with(&format!("{prefix}/")));
            let expected = prefixes.iter().filter(matches).max_by_key(|prefix| prefix.len()).cloned();
            let table = RouteTable::new(prefixes.into_iter().map(|prefix| (prefix.clone(), prefix)));
            prop_assert_eq!(table.find(path.as_bytes()).map(|found| found.to.clone()), expected);
        }

        #[test]
        fn decoding_never_panics(path in prop::collection::vec(any::<u8>(), 0..40)) {
            prop_assert!(decoded(&path).len() <= path.len());
        }
    }
}
