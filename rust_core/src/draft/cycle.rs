//! One whole cycle of greedy decoding: draft a tree for each row, verify all of them in one pass,
//! keep what the base says too. Without a plan each row is given one token.
//!
//! Every token is the base's own best word at its place, so the text does not depend on what was
//! drafted; drafts decide how far one verification carries.

use std::time::{Duration, Instant};

use super::call::Call;
use super::model::{HeadPart, Model, Part};
use super::plan::Plan;
use super::rows::{Ends, Outcome, Row, RowOutcome, Start};
use super::tree::DraftTree;
use crate::error::{CoreError, Result, check_length};

/// The exit head that drafts.
#[derive(Debug, Clone)]
pub struct HeadSetting {
    /// Layers of the base before its checkpoint.
    pub entry: usize,
    /// Whether it takes the final states of predecessors.
    pub feeds: bool,
    /// Tokens of its words; `None` where words are tokens.
    pub words: Option<Vec<i64>>,
}

/// When a call begins no further cycle; none is begun behind the end of a row either.
#[derive(Debug, Clone, Copy)]
pub struct Limit {
    /// After so many.
    pub cycles: usize,
    /// After so long.
    pub time: Duration,
}

/// A batch that is decoded cycle by cycle.
#[derive(Debug)]
pub struct GreedyCycle {
    rows: Vec<Row>,
    ends: Ends,
    head: Option<HeadSetting>,
    taps: Vec<usize>,
}

impl GreedyCycle {
    /// Begins behind a prompt. At `taps`, numbers of layers in ascending order, and at the end
    /// states are handed out; a cycle that has some neither drafts nor has a head.
    #[must_use]
    pub fn new(rows: Vec<Start>, ends: Ends, head: Option<HeadSetting>, taps: Vec<usize>) -> Self {
        Self { rows: rows.into_iter().map(Row::from).collect(), ends, head, taps }
    }

    /// Number of rows.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.rows.len()
    }

    /// Runs cycles for the rows that have not ended; the others are spared. Where a head was told
    /// of, it must be given, and is asked if the cycles `asks` and the plan finds it worthwhile.
    ///
    /// # Errors
    /// [`CoreError`] if parts do not fit; the cycle must not be used any more then.
    pub fn run(
        &mut self,
        model: Model<'_>,
        base: Part<'_>,
        head: Option<HeadPart<'_>>,
        plan: Option<&Plan>,
        asks: bool,
        limit: Limit,
    ) -> Result<Vec<Outcome>> {
        self.check(&model, &base, head.as_ref(), plan)?;
        let going: Vec<usize> = (0..self.rows.len()).filter(|&row| !self.rows[row].done).collect();
        if going.is_empty() {
            return Ok(Vec::new());
        }
        let Part { stack, cache } = base;
        cache.with_rows(&going, |cache| {
            let base = Part { stack, cache };
            let Some(HeadPart { part: Part { stack, cache }, output }) = head else {
                return self.cycles(model, base, None, plan, asks, limit);
            };
            cache.with_rows(&going, |cache| {
                let head = HeadPart { part: Part { stack, cache }, output };
                self.cycles(model, base, Some(head), plan, asks, limit)
            })
        })
    }

    /// One cycle after the other, all of the same rows.
    fn cycles(
        &mut self,
        model: Model<'_>,
        base: Part<'_>,
        mut head: Option<HeadPart<'_>>,
        plan: Option<&Plan>,
        asks: bool,
        limit: Limit,
    ) -> Result<Vec<Outcome>> {
        let begun = Instant::now();
        let going = |rows: &[Row]| rows.iter().filter(|row| !row.done).count();
        let (Part { stack, cache }, rows) = (base, going(&self.rows));
        let mut found = Vec::new();
        loop {
            let base = Part { stack, cache: &mut *cache };
            let head = head.as_mut().map(|HeadPart { part: Part { stack, cache }, output }| {
                HeadPart { part: Part { stack, cache }, output }
            });
            found.push(self.cycle(model, base, head, plan, asks)?);
            let is_full = found.len() >= limit.cycles || begun.elapsed() >= limit.time;
            if is_full || going(&self.rows) < rows {
                return Ok(found);
            }
        }
    }

    fn check(
        &self,
        model: &Model<'_>,
        base: &Part<'_>,
        head: Option<&HeadPart<'_>>,
        plan: Option<&Plan>,
    ) -> Result<()> {
        let (rows, width) = (self.rows.len(), base.stack.width());
        check_length("cache", base.cache.rows(), rows, "the rows of the cycle")?;
        check_length("embedding", model.embedding.words.columns(), width, "the layers' width")?;
        if let Some(plan) = plan {
            plan.check()?;
        }
        let layers = base.stack.layers().len();
        if !self.taps.is_empty() {
            if plan.is_some() || head.is_some() {
                return Err(CoreError::value("taps", "none where there are drafts", 1.0));
            }
            if !self.taps.is_sorted() || self.taps.last().is_some_and(|&last| last > layers) {
                let found = self.taps.last().map_or(0.0, |&last| last as f64);
                return Err(CoreError::value("taps", "ascending and within the layers", found));
            }
        }
        if head.is_some() != self.head.is_some() {
            return Err(CoreError::value("head", "given where one was told of", 0.0));
        }
        let (Some(head), Some(setting)) = (head, &self.head) else { return Ok(()) };
        check_length("the head's cache", head.part.cache.rows(), rows, "the rows of the cycle")?;
        check_length("the head", head.part.stack.width(), width, "the layers' width")?;
        for row in &self.rows {
            check_length("last", row.head.last.len(), width, "the layers' width")?;
        }
        if setting.entry > layers {
            let found = setting.entry as f64;
            return Err(CoreError::value("entry", "within the layers", found));
        }
        Ok(())
    }

    fn cycle(
        &mut self,
        model: Model<'_>,
        base: Part<'_>,
        head: Option<HeadPart<'_>>,
        plan: Option<&Plan>,
        asks: bool,
    ) -> Result<Outcome> {
        let (places, rows): (Vec<usize>, Vec<&mut Row>) =
            self.rows.iter_mut().enumerate().filter(|(_, row)| !row.done).unzip();
        let drafts = |row: &Row| if plan.is_some() { row.left.saturating_sub(1) } else { 0 };
        let trees: Vec<DraftTree> =
            rows.iter().map(|row| DraftTree::new(row.root(), drafts(row), false)).collect();
        let hidden = rows.iter().map(|_| Vec::new()).collect();
        let (ends, setting) = (&self.ends, self.head.as_ref());
        let mut call = Call { ends, setting, model, base, head, rows, trees, hidden };
        let mut tapped = Vec::new();
        let (mut drafted, mut levels) = (false, Vec::new());
        if let Some(plan) = plan {
            (drafted, levels) = call.draft(plan, asks)?;
        }
        let begun = Instant::now();
        let last = call.verify(&self.taps, &mut tapped)?;
        let mut walks = call.walk(&last)?;
        let lengths: Vec<usize> = call.rows.iter().map(|row| row.length).collect();
        let paths: Vec<Vec<usize>> =
            walks.iter_mut().map(|walk| std::mem::take(&mut walk.path)).collect();
        call.base.cache.keep(0..call.base.stack.layers().len(), &lengths, &paths)?;
        let verify = begun.elapsed().as_secs_f64();
        call.settle(&last, &paths);
        if !self.taps.is_empty() {
            tapped.push(last);
        }
        let nodes = call.size();
        let rows = places.into_iter().zip(call.trees).zip(walks).zip(paths);
        let rows = rows.map(|(((row, tree), walk), path)| RowOutcome {
            row,
            tree,
            path,
            words: walk.words,
            origins: walk.origins,
        });
        Ok(Outcome { rows: rows.collect(), nodes, drafted, levels, verify, tapped })
    }
}
