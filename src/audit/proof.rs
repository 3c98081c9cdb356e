//! Inclusion and consistency proofs (RFC 9162, section 2.1.3 and 2.1.4; the trees are those of RFC 6962).
//! A proof is planned as ranges of leaves first, so that it can be made from a stream in constant memory.

use std::ops::Range;

use super::merkle::{Frontier, Hash, node_hash};

/// The largest power of two smaller than `n`; `n` is at least 2.
const fn split(n: u64) -> u64 {
    1 << (n - 1).ilog2()
}

/// The ranges of leaves whose subtree roots prove that leaf `index` is in the tree of `size` leaves,
/// from the leaf up. `None` if there is no such leaf.
pub fn inclusion_ranges(index: u64, size: u64) -> Option<Vec<Range<u64>>> {
    if index >= size {
        return None;
    }
    let (mut low, mut high, mut ranges) = (0, size, Vec::new());
    while high - low > 1 {
        let middle = low + split(high - low);
        if index < middle {
            ranges.push(middle..high);
            high = middle;
        } else {
            ranges.push(low..middle);
            low = middle;
        }
    }
    ranges.reverse();
    Some(ranges)
}

/// The ranges of leaves whose subtree roots prove that the tree of `new` leaves extends the one of `old`.
/// `None` if `old` is zero or larger than `new`: there is nothing to prove, or no proof.
pub fn consistency_ranges(old: u64, new: u64) -> Option<Vec<Range<u64>>> {
    if old == 0 || old > new {
        return None;
    }
    let (mut low, mut high, mut ranges) = (0, new, Vec::new());
    while high != old {
        let middle = low + split(high - low);
        if old <= middle {
            ranges.push(middle..high);
            high = middle;
        } else {
            ranges.push(low..middle);
            low = middle;
        }
    }
    // The subtree that both trees share. When it starts at 0 it *is* the old tree, whose root is known.
    if low != 0 {
        ranges.push(low..high);
    }
    ranges.reverse();
    Some(ranges)
}

/// Hashes planned ranges while leaves stream by in order.
#[derive(Debug)]
pub struct RangeHasher {
    ranges: Vec<(Range<u64>, Frontier)>,
    next: u64,
}

impl RangeHasher {
    /// Starts at leaf 0.
    pub fn new(ranges: Vec<Range<u64>>) -> Self {
        Self { ranges: ranges.into_iter().map(|r| (r, Frontier::new())).collect(), next: 0 }
    }

    /// Takes the next leaf.
    pub fn push(&mut self, leaf: Hash) {
        for (range, frontier) in &mut self.ranges {
            if range.contains(&self.next) {
                frontier.push(leaf);
            }
        }
        self.next += 1;
    }

    /// The hashes in the order of the plan; `None` if the stream ended too early.
    pub fn finish(self) -> Option<Vec<Hash>> {
        self.ranges.iter().map(|(r, f)| (f.size() == r.end - r.start).then(|| f.root())).collect()
    }
}

/// Checks that `leaf` (a leaf hash) is leaf number `index` of the tree with `size` leaves and this root
/// (RFC 9162, section 2.1.3.2).
pub fn verify_inclusion(leaf: Hash, index: u64, size: u64, proof: &[Hash], root: Hash) -> bool {
    if index >= size {
        return false;
    }
    let (mut node, mut last, mut hash) = (index, size - 1, leaf);
    for step in proof {
        if last == 0 {
            return false;
        }
        if node & 1 == 1 || node == last {
            hash = node_hash(step, &hash);
            while node & 1 == 0 && node != 0 {
                node >>= 1;
                last >>= 1;
            }
        } else {
            hash = node_hash(&hash, step);
        }
        node >>= 1;
        last >>= 1;
    }
    last == 0 && hash == root
}

/// Checks that the tree (`new`, `new_root`) extends the tree (`old`, `old_root`)
/// (RFC 9162, section 2.1.4.2). Every tree extends the empty one, with an empty proof.
pub fn verify_consistency(old: u64, old_root: Hash, new: u64, new_root: Hash, proof: &[Hash]) -> bool {
    if old == new {
        return proof.is_empty() && old_root == new_root;
    }
    if old == 0 {
        return proof.is_empty() && old_root == super::merkle::empty_root();
    }
    if old > new {
        return false;
    }
    let (first, rest) = if old.is_power_of_two() {
        (old_root, proof)
    } else {
        let Some((first, rest)) = proof.split_first() else { return false };
        (*first, rest)
    };
    let (mut node, mut last) = (old - 1, new - 1);
    while node & 1 == 1 {
        node >>= 1;
        last >>= 1;
    }
    let (mut old_hash, mut new_hash) = (first, first);
    for step in rest {
        if last == 0 {
            return false;
        }
        if node & 1 == 1 || node == last {
            old_hash = node_hash(step, &old_hash);
            new_hash = node_hash(step, &new_hash);
            while node & 1 == 0 && node != 0 {
                node >>= 1;
                last >>= 1;
            }
        } else {
            new_hash = node_hash(&new_hash, step);
        }
        node >>= 1;
        last >>= 1;
    }
    last == 0 && old_hash == old_root && new_hash == new_root
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::audit::merkle::leaf_hash;

    fn leaf(i: u64) -> Hash {
        leaf_hash(&i.to_be_bytes())
    }
    fn root(size: u64) -> Hash {
        let mut frontier = Frontier::new();
        (0..size).for_each(|i| frontier.push(leaf(i)));
        frontier.root()
    }
    fn prove(ranges: Vec<Range<u64>>, size: u64) -> Vec<Hash> {
        let mut hasher = RangeHasher::new(ranges);
        (0..size).for_each(|i| hasher.push(leaf(i)));
        hasher.finish().unwrap()
    }

    #[test]
    fn every_inclusion_and_consistency_proof_of_small_trees_holds() {
        for size in 1..40 {
            for index in 0..size {
                let proof = prove(inclusion_ranges(index, size).unwrap(), size);
                assert!(verify_inclusion(leaf(index), index, size, &proof, root(size)), "{index} of {size}");
            }
            for old in 1..=size {
                let proof = prove(consistency_ranges(old, size).unwrap(), size);
                assert!(verify_consistency(old, root(old), size, root(size), &proof), "{old} to {size}");
            }
        }
        assert!(inclusion_ranges(3, 3).is_none());
        assert!(consistency_ranges(4, 3).is_none());
        assert!(consistency_ranges(0, 3).is_none());
    }

    /// The proof that the Certificate Transparency reference implementation tests with.
    #[test]
    fn known_proof_of_certificate_transparency() {
        let data = ["", "00", "10", "2021", "3031", "40414243", "5051525354555657", "606162636465666768696a6b6c6d6e6f"];
        let mut hasher = RangeHasher::new(inclusion_ranges(5, 8).unwrap());
        for d in data {
            hasher.push(leaf_hash(&hex::decode(d).unwrap()));
        }
        let proof: Vec<String> = hasher.finish().unwrap().iter().map(|h| hex::encode(h.0)).collect();
        assert_eq!(
            proof,
            [
                "bc1a0643b12e4d2d7c77918f44e0f4f79a838b6cf9ec5b5c283e1f4d88599e6b",
                "ca854ea128ed050b41b35ffc1b87b8eb2bde461e9e3b5596ece6b9d5975a0ae0",
                "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
            ]
        );
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn a_changed_proof_never_holds(size in 2u64..300, a in any::<u64>(), b in any::<u64>(), bit in any::<u16>()) {
            let (index, old) = (a % size, 1 + b % (size - 1));
            let (root, old_root) = (root(size), root(old));
            for (mut proof, consistency) in [
                (prove(inclusion_ranges(index, size).unwrap(), size), false),
                (prove(consistency_ranges(old, size).unwrap(), size), true),
            ] {
                let holds = |proof: &[Hash]| if consistency {
                    verify_consistency(old, old_root, size, root, proof)
                } else {
                    verify_inclusion(leaf(index), index, size, proof, root)
                };
                prop_assert!(holds(&proof));
                let mut longer = proof.clone();
                longer.push(leaf(a));
                prop_assert!(!holds(&longer));
                prop_assert!(!holds(&proof[1..]));
                let at = usize::from(bit) % proof.len();
                proof[at].0[usize::from(bit / 8) % 32] ^= 1 << (bit % 8);
                prop_assert!(!holds(&proof));
            }
            let proof = prove(inclusion_ranges(index, size).unwrap(), size);
            prop_assert!(!verify_inclusion(leaf(index + 1), index, size, &proof, root));
            prop_assert!(!verify_inclusion(leaf(index), index, size, &proof, old_root));
        }

        #[test]
        fn verifying_nonsense_never_panics(index: u64, size: u64, n in 0usize..70) {
            let proof = vec![leaf(1); n];
            prop_assert!(!verify_inclusion(leaf(index), index, size, &proof, leaf(2)));
            prop_assert!(!verify_consistency(index, leaf(3), size, leaf(2), &proof));
        }

        #[test]
        fn huge_trees_can_be_planned(index: u64, size in 1u64..) {
            let index = index % size;
            prop_assert!(inclusion_ranges(index, size).unwrap().len() <= 64);
            prop_assert!(consistency_ranges(index.max(1), size).unwrap().len() <= 65);
        }
    }
}
