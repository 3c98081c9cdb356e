//! Numbers from a seed (SplitMix64): what a cycle does can be asked for again, what the machine makes of it can't.

#[derive(Debug, Clone)]
pub struct Seed(u64);

impl Seed {
    /// The numbers of one cycle, told apart from those of every other.
    pub fn of(seed: u64, parts: &[u64]) -> Self {
        let mut numbers = Self(seed);
        for part in parts {
            numbers.0 = numbers.next() ^ part.wrapping_mul(0xd6e8_feb8_6659_fd93);
        }
        numbers
    }

    pub const fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Below `n`.
    pub const fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    /// True in so many of a hundred.
    pub const fn percent(&mut self, n: u64) -> bool {
        self.below(100) < n
    }

    pub fn shuffle<T>(&mut self, all: &mut [T]) {
        for i in (1..all.len()).rev() {
            let j = usize::try_from(self.below(i as u64 + 1)).unwrap();
            all.swap(i, j);
        }
    }
}
