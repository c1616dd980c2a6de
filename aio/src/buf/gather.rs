//! Buffers put together from several: [`Gather`] to write from, [`Scatter`] to read into.

use super::span::{RawSegment, Span};
use super::{IoVec, IoVecMut};
use std::marker::PhantomData;

/// A source put together from several, for instance padding, payload, padding.
#[derive(Default, Debug)]
pub struct Gather<'a> {
    segments: Vec<RawSegment>,
    lent: PhantomData<&'a [u8]>,
}

impl<'a> Gather<'a> {
    /// Nothing in it.
    pub fn new() -> Self {
        Self::default()
    }

    /// Appends all of `part`.
    pub fn push(&mut self, part: impl Into<IoVec<'a>>) {
        self.segments.extend(part.into().segments());
    }

    /// Everything that was pushed, in order.
    pub fn as_iovec(&self) -> IoVec<'_> {
        IoVec {
            span: Span::list(&self.segments),
        }
    }
}

/// A destination put together from several.
#[derive(Default, Debug)]
pub struct Scatter<'a> {
    segments: Vec<RawSegment>,
    lent: PhantomData<&'a mut [u8]>,
}

impl<'a> Scatter<'a> {
    /// Nothing in it.
    pub fn new() -> Self {
        Self::default()
    }

    /// Appends all of `part`.
    pub fn push(&mut self, part: impl Into<IoVecMut<'a>>) {
        self.segments.extend(part.into().segments());
    }

    /// Everything that was pushed, in order.
    pub fn as_iovec_mut(&mut self) -> IoVecMut<'_> {
        IoVecMut {
            span: Span::list(&self.segments),
            unique: PhantomData,
        }
    }
}
