//! Keeps freed blocks of memory for the next tensors. A pass over layers asks for the same sizes over and over; the system would clear
//! every page of a large block anew, which takes a tenth of a run's time on the CPU.
//!
//! No more is held than was once in use: where a size is not at hand, kept blocks go back to the system before it is asked for one.

use std::alloc::{GlobalAlloc, Layout, System};
use std::ptr;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Bytes from which on a block is kept. Smaller ones are kept by malloc.
const LARGE: usize = 1 << 20;

/// Most blocks that are kept.
const MOST: usize = 1024;

/// The system's allocator, but for large blocks.
pub struct Blocks {
    kept: Mutex<Kept>,
}

/// Addresses and sizes, the one that was freed first at the front.
struct Kept {
    blocks: [(usize, usize); MOST],
    count: usize,
}

impl Blocks {
    /// With nothing kept.
    #[allow(clippy::new_without_default)] // It is made where a constant is needed.
    pub const fn new() -> Blocks {
        Blocks { kept: Mutex::new(Kept { blocks: [(0, 0); MOST], count: 0 }) }
    }

    fn kept(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A block of this layout that is kept; else gives as much back to the system as it takes.
    fn reuse(&self, layout: Layout) -> Option<*mut u8> {
        let mut kept = self.kept();
        if let Some(at) = (0..kept.count).rev().find(|at| kept.blocks[*at].1 == layout.size()) {
            return Some(kept.remove(at).0 as *mut u8);
        }
        let mut freed = 0;
        while freed < layout.size() && kept.count > 0 {
            freed += kept.free_first();
        }
        None
    }
}

impl Kept {
    fn remove(&mut self, at: usize) -> (usize, usize) {
        let block = self.blocks[at];
        self.blocks.copy_within(at + 1..self.count, at);
        self.count -= 1;
        block
    }

    /// Gives the block that was freed first back to the system; returns its size.
    fn free_first(&mut self) -> usize {
        let (at, size) = self.remove(0);
        if let Ok(layout) = Layout::from_size_align(size, ALIGN) {
            // SAFETY: the block came from the system's allocator with this layout.
            unsafe { System.dealloc(at as *mut u8, layout) };
        }
        size
    }
}

/// The layout that a large block is asked for by, so that sizes which differ little are one: an eighth of a power of two. `None` for others.
fn of_large(layout: Layout) -> Option<Layout> {
    if layout.size() < LARGE || layout.align() > ALIGN {
        return None;
    }
    let step = layout.size().next_power_of_two() / 16;
    Layout::from_size_align(layout.size().checked_next_multiple_of(step)?, ALIGN).ok()
}

/// The alignment of large blocks: what malloc gives by itself.
const ALIGN: usize = 16;

// SAFETY: blocks come from the system's allocator by a layout that follows from the caller's, and are at least as large; one that is kept
// is handed out once.
unsafe impl GlobalAlloc for Blocks {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        match of_large(layout) {
            // SAFETY: the caller's promise is the system allocator's.
            None => unsafe { System.alloc(layout) },
            // SAFETY: the layout is not of size 0.
            Some(layout) => self.reuse(layout).unwrap_or_else(|| unsafe { System.alloc(layout) }),
        }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        let Some(large) = of_large(layout) else {
            // SAFETY: the caller's promise is the system allocator's.
            return unsafe { System.alloc_zeroed(layout) };
        };
        match self.reuse(large) {
            Some(block) => {
                // SAFETY: the block has as many bytes.
                unsafe { ptr::write_bytes(block, 0, layout.size()) };
                block
            }
            // SAFETY: the layout is not of size 0.
            None => unsafe { System.alloc_zeroed(large) },
        }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        let Some(large) = of_large(layout) else {
            // SAFETY: the block came from the system's allocator with this layout.
            return unsafe { System.dealloc(block, layout) };
        };
        let mut kept = self.kept();
        if kept.count == MOST {
            kept.free_first();
        }
        let at = kept.count;
        kept.blocks[at] = (block as usize, large.size());
        kept.count += 1;
    }

    unsafe fn realloc(&self, block: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        let Ok(new) = Layout::from_size_align(size, layout.align()) else { return ptr::null_mut() };
        match (of_large(layout), of_large(new)) {
            // SAFETY: the block came from the system's allocator with this layout.
            (None, None) => unsafe { System.realloc(block, layout, size) },
            (Some(old), Some(new)) if old == new => block,
            // SAFETY: likewise, by the layout that large blocks have.
            (Some(old), Some(new)) => unsafe { System.realloc(block, old, new.size()) },
            _ => {
                // SAFETY: the new block is apart from the old one; both have as many bytes as are copied.
                unsafe {
                    let to = self.alloc(new);
                    if !to.is_null() {
                        ptr::copy_nonoverlapping(block, to, layout.size().min(size));
                        self.dealloc(block, layout);
                    }
                    to
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)] // In a test, a panic is the report.

    use super::*;

    #[test]
    fn a_block_is_handed_out_again_and_zeros_are_zeros() {
        let blocks = Blocks::new();
        let of = |size: usize| Layout::from_size_align(size, 4).unwrap();
        // SAFETY: every block is written within its size, and given back once with its layout.
        unsafe {
            let first = blocks.alloc(of(LARGE + 5));
            ptr::write_bytes(first, 7, LARGE + 5);
            blocks.dealloc(first, of(LARGE + 5));
            assert_eq!(blocks.kept().count, 1);
            let again = blocks.alloc_zeroed(of(LARGE + 9));
            assert_eq!((again, blocks.kept().count), (first, 0));
            assert!(std::slice::from_raw_parts(again, LARGE + 9).iter().all(|byte| *byte == 0));
            *again = 3;
            let grown = blocks.realloc(again, of(LARGE + 9), 3 * LARGE);
            assert_eq!(*grown, 3);
            let small = blocks.realloc(grown, of(3 * LARGE), 100);
            assert_eq!((*small, blocks.kept().count), (3, 1));
            blocks.dealloc(small, of(100));
            // Another size: what is kept goes back first.
            let other = blocks.alloc(of(2 * LARGE));
            assert_eq!(blocks.kept().count, 0);
            blocks.dealloc(other, of(2 * LARGE));
        }
    }
}
