//! Drafts found in the text itself: what followed when its last words occurred before.

/// Fewest and most of the last tokens that are looked for, where nobody says otherwise.
pub const SPAN: (usize, usize) = (2, 4);

/// Where a text has gone on before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Hit {
    /// The first token that followed.
    pub start: usize,
    /// How many of the last tokens had occurred before it.
    pub matched: usize,
}

/// The latest earlier occurrence of the text's last tokens, `shortest` to `longest` of them; the
/// longest match wins. Two tokens are the fewest that count.
#[must_use]
pub fn find_continuation(text: &[i64], shortest: usize, longest: usize) -> Option<Hit> {
    let (last, before) = text.split_last()?;
    let mut best: Option<Hit> = None;
    for end in (0..before.len()).rev().filter(|&end| before[end] == *last) {
        let backwards = text[..=end].iter().rev().zip(text.iter().rev());
        let matched = backwards.take(longest).take_while(|(a, b)| a == b).count();
        let is_longer = best.is_none_or(|best| matched > best.matched);
        if matched >= shortest.max(2) && is_longer {
            best = Some(Hit { start: end + 1, matched });
        }
        if matched == longest {
            break;
        }
    }
    best
}
