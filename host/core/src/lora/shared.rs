//! Several adapters of one model in one shape, so that a device that has room for one can have each of them in its place.

use std::collections::BTreeMap;

use crate::error::{Error, Result};
use crate::weights::BlockId;

use super::{Adapter, Init, Site};

/// Brings adapters into one shape: one has the modules of all of them, each with the highest rank. What an adapter has not is zero there,
/// and a B is as much larger as its scale is than the shape's: `W + scale · B · A` is what it was. One adapter stays as it is.
///
/// # Errors
/// DoRA among several: a module that it does not adapt would need the lengths of its weight's rows.
pub fn in_one_shape(mut adapters: Vec<Adapter>) -> Result<Vec<Adapter>> {
    if adapters.len() < 2 {
        return Ok(adapters);
    }
    if adapters.iter().any(|adapter| adapter.config.dora) {
        return Err(Error::input("an adapter with DoRA cannot share a device with others")
            .at("--adapter")
            .help("serve it alone, or merge it: dpo-host merge"));
    }
    adapters.iter_mut().for_each(add_subtracted);
    let mut shape: BTreeMap<(BlockId, usize, usize), Site> = BTreeMap::new();
    for site in adapters.iter().flat_map(|adapter| &adapter.sites) {
        let of_all = shape.entry((site.node.0, site.node.1, site.weight)).or_insert_with(|| site.clone());
        of_all.rank = of_all.rank.max(site.rank);
    }
    let mut offset = 0;
    let mut sites: Vec<Site> = shape.into_values().collect();
    for site in &mut sites {
        site.offset = offset;
        offset += site.numbers();
    }
    Ok(adapters.iter().map(|adapter| reshaped(adapter, &sites)).collect())
}

/// The same update in the places of other sites, which have all of its own.
fn reshaped(adapter: &Adapter, sites: &[Site]) -> Adapter {
    let mut all = Adapter { sites: sites.to_vec(), subtracted: Vec::new(), ..adapter.clone() };
    all.config.rank = sites.iter().map(|site| site.rank).max().unwrap_or(1);
    all.params = vec![0.0; all.parameters()];
    for own in &adapter.sites {
        let Some(site) = sites.iter().find(|s| s.node == own.node && s.weight == own.weight) else { continue };
        let ([a, b], [to_a, to_b]) = (adapter.ranges(own), all.ranges(site));
        for expert in 0..own.experts {
            let (from, to) = (a.start + expert * own.rank * own.inputs, to_a.start + expert * site.rank * own.inputs);
            let count = own.rank * own.inputs;
            all.params[to..to + count].copy_from_slice(&adapter.params[from..from + count]);
        }
        let by = (own.scale / site.scale) as f32;
        for row in 0..own.experts * own.outputs {
            let (from, to) = (b.start + row * own.rank, to_b.start + row * site.rank);
            let values = adapter.params[from..from + own.rank].iter().map(|b| b * by);
            all.params[to..to + own.rank].iter_mut().zip(values).for_each(|(to, b)| *to = b);
        }
    }
    all
}

/// Makes of an update that is a difference (see [`Init`]) a sum of twice the rank.
fn add_subtracted(adapter: &mut Adapter) {
    if adapter.subtracted.is_empty() {
        return;
    }
    let mut sites = adapter.sites.clone();
    let (mut offset, mut params) = (0, Vec::new());
    for (site, own) in sites.iter_mut().zip(&adapter.sites) {
        let [a, b] = adapter.ranges(own);
        let row = own.rank * own.inputs;
        for expert in 0..own.experts {
            let of = a.start + expert * row..a.start + (expert + 1) * row;
            params.extend_from_slice(&adapter.params[of.clone()]);
            params.extend_from_slice(&adapter.subtracted[of]);
        }
        for at in (b.start..b.end).step_by(own.rank) {
            params.extend_from_slice(&adapter.params[at..at + own.rank]);
            params.extend(adapter.subtracted[at..at + own.rank].iter().map(|b| -b));
        }
        (site.rank, site.offset) = (2 * own.rank, offset);
        offset += site.numbers();
    }
    (adapter.sites, adapter.params) = (sites, params);
    adapter.subtracted.clear();
    adapter.config.init = Init::default();
}
