//! Memory that attention takes on the CPU, counted by the allocator: no more than is planned, whatever the length of an example
//! and the number of its heads.

#![allow(clippy::unwrap_used)] // In a test, a panic is the report.

use std::alloc::{GlobalAlloc, Layout as Size, System};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use candle_core::{Device, Tensor};
use dpo_core::batch::{Layout, Span};
use dpo_core::ops::{self, Call, Kernel, attention};
use dpo_plugin_api::graph::Node;
use serde_json::json;

/// The system's allocator, and how many bytes of it are in use.
struct Counting;

static HELD: AtomicUsize = AtomicUsize::new(0);
static MOST: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call is passed on to the system's allocator as it is.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, size: Size) -> *mut u8 {
        MOST.fetch_max(HELD.fetch_add(size.size(), Relaxed) + size.size(), Relaxed);
        // SAFETY: the caller's promise is the system allocator's.
        unsafe { System.alloc(size) }
    }

    unsafe fn dealloc(&self, at: *mut u8, size: Size) {
        HELD.fetch_sub(size.size(), Relaxed);
        // SAFETY: what is given back came from the system's allocator.
        unsafe { System.dealloc(at, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Most bytes that are held while something runs, beyond those that are held before.
fn most(run: impl FnOnce()) -> usize {
    let before = HELD.load(Relaxed);
    MOST.store(before, Relaxed);
    run();
    MOST.load(Relaxed) - before
}

#[test]
fn attention_holds_no_more_than_is_planned() {
    let dim = 4;
    let Kernel::Value { forward, vjp } = ops::find("attention").unwrap().kernel else { panic!() };
    let cases =
        [(64, 1, json!({})), (64, 1, json!({"softcap": 2.0})), (32, 8, json!({})), (4, 4, json!({"window": 100}))];
    for (heads, kv_heads, more) in cases {
        let span = Span { start: 0, prompt: 600, answers: vec![300, 200, 100] };
        let n = span.len();
        let mut attrs = json!({"heads": heads, "kv_heads": kv_heads, "head_dim": dim, "scale": 0.5});
        attrs.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let node: Node = serde_json::from_value(json!({
            "op": "attention", "inputs": [0, 1, 2], "weights": [], "attrs": attrs, "width": heads * dim,
        }))
        .unwrap();
        let numbers = |h: usize| Tensor::randn(0.0_f32, 1.0, (n, h * dim), &Device::Cpu).unwrap();
        let (q, k, v, dy) = (numbers(heads), numbers(kv_heads), numbers(kv_heads), numbers(heads));
        let layout = Layout { spans: vec![span], ..Layout::default() };
        let call = Call {
            node: &node,
            inputs: vec![&q, &k, &v],
            weights: &[],
            loras: &[],
            layout: &layout,
            input_gradients: true,
            router_dprobs: &[],
        };
        // Gradients, head by head and side by side.
        let copies = 2 * n * (heads + 2 * kv_heads) * dim * 4;
        let planned = attention::workspace(n) + copies;
        let held = [most(|| drop(forward(&call).unwrap())), most(|| drop(vjp(&call, &dy).unwrap()))];
        assert!(held.iter().all(|h| *h <= planned), "{heads} heads on {kv_heads}, {more}: {held:?} of {planned}");
        // The plan is not made of air where a token sees all before it, and all scores at once would not have fitted.
        let windowed = more.get("window").is_some();
        assert!(windowed || held[1] > planned / 3, "{heads} heads on {kv_heads}, {more}: {held:?} of {planned}");
        let all = heads * n * n * 4;
        assert!(planned < all / 5, "{planned} of {all}");
    }
}
