//! Which tokens of a call run a gated unit on equally many channels.

use std::ops::Range;

/// The tokens of one layer, those of equal width next to each other.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Widths {
    order: Vec<usize>,
    groups: Vec<Group>,
}

/// Neighbouring places whose tokens run on the same channels.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Group {
    /// How many channels, the first ones.
    pub channels: usize,
    /// Places in the order.
    pub places: Range<usize>,
}

impl Widths {
    /// For each layer, given how many channels it has and how many of them each of `count` tokens
    /// keeps, `[layers, tokens]`; without these everybody keeps all.
    #[must_use]
    pub fn all(inners: &[usize], kept: Option<&[usize]>, count: usize) -> Vec<Self> {
        let of = |(layer, &inner): (usize, &usize)| match kept {
            Some(kept) => Self::new(&kept[layer * count..][..count]),
            None => Self::new(&vec![inner; count]),
        };
        inners.iter().enumerate().map(of).collect()
    }

    fn new(kept: &[usize]) -> Self {
        let mut order: Vec<usize> = (0..kept.len()).collect();
        // Stable: tokens of a group stay in their order.
        order.sort_by_key(|&token| kept[token]);
        let mut groups: Vec<Group> = Vec::new();
        for (place, &token) in order.iter().enumerate() {
            match groups.last_mut() {
                Some(last) if last.channels == kept[token] => last.places.end = place + 1,
                _ => groups.push(Group { channels: kept[token], places: place..place + 1 }),
            }
        }
        Self { order, groups }
    }

    /// The token of each place.
    #[must_use]
    pub fn order(&self) -> &[usize] {
        &self.order
    }

    /// The groups, narrowest first.
    #[must_use]
    pub fn groups(&self) -> &[Group] {
        &self.groups
    }
}

#[cfg(test)]
mod tests {
    use super::{Group, Widths};

    #[test]
    fn tokens_of_equal_width_stand_together() {
        let all = Widths::all(&[8], Some(&[8, 2, 8, 5, 2]), 5);
        assert_eq!(all.len(), 1);
        let widths = &all[0];
        assert_eq!(widths.order(), [1, 4, 3, 0, 2]);
        let group = |channels, places| Group { channels, places };
        assert_eq!(widths.groups(), [group(2, 0..2), group(5, 2..3), group(8, 3..5)]);
    }

    #[test]
    fn everybody_keeps_all_unless_told_otherwise() {
        let all = Widths::all(&[8, 6], None, 2);
        assert_eq!(all.len(), 2);
        let (one, two) = (&all[0], &all[1]);
        assert_eq!(one.groups(), [Group { channels: 8, places: 0..2 }]);
        assert_eq!(two.groups(), [Group { channels: 6, places: 0..2 }]);
        assert_eq!(two.order(), [0, 1]);
    }
}
