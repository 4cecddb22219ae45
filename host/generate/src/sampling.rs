//! Which token comes next: the most likely one, or one drawn as transformers draws it (`generation/logits_process.py`):
//! repetition penalty, temperature, top-k, top-p, in this order. What OpenAI's API has beside them comes behind the repetition penalty:
//! `logit - frequency_penalty * count - presence_penalty * (count > 0) + logit_bias`, counted over the answer.
//!
//! candle-transformers has the like, at the price of building a hundred models.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::Value;

use dpo_core::error::{Error, Result};
use dpo_data::read_json;

/// Tokens of an answer, unless something else is said.
const MAX_NEW_TOKENS: usize = 512;

/// How the user wants tokens drawn; what is left out is as in the model's `generation_config.json`.
#[derive(Clone, Debug, Default)]
pub struct SamplingOptions {
    /// 0 takes the most likely token.
    pub temperature: Option<f64>,
    /// Probability of the tokens that are drawn from.
    pub top_p: Option<f64>,
    /// Number of tokens that are drawn from.
    pub top_k: Option<usize>,
    /// What logits of tokens that were there before are divided by.
    pub repetition_penalty: Option<f64>,
    /// Most tokens of an answer.
    pub max_new_tokens: Option<usize>,
    /// Seed of the draws.
    pub seed: u64,
}

/// How tokens are drawn.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampling {
    /// 0 for the most likely token.
    pub temperature: f64,
    /// Probability of the tokens that are drawn from; 1 for all.
    pub top_p: f64,
    /// Number of tokens that are drawn from; `usize::MAX` for all.
    pub top_k: usize,
    /// What logits of tokens that were there before are divided by.
    pub repetition_penalty: f64,
    /// Most tokens of an answer.
    pub max_new_tokens: usize,
    /// Seed of the draws.
    pub seed: u64,
    /// What the logit of a token loses for every time that the answer has it.
    pub frequency_penalty: f64,
    /// What it loses where the answer has it.
    pub presence_penalty: f64,
    /// What is added to logits of tokens.
    pub logit_bias: BTreeMap<u32, f32>,
    /// Strings that end an answer, and are not part of it.
    pub stop: Vec<String>,
    /// Whether an answer goes on where the model ends its turn.
    pub ignore_eos: bool,
    /// How many of the likeliest tokens are told with every token's log-prob; `None` tells none.
    pub logprobs: Option<usize>,
}

/// The log-prob of a token as the model gives it, before anything of [`Sampling`].
#[derive(Clone, Debug, PartialEq)]
pub struct TokenLogProb {
    /// The token.
    pub id: u32,
    /// Its log-prob.
    pub logprob: f32,
    /// The likeliest tokens with theirs, likely ones first.
    pub top: Vec<(u32, f32)>,
}

impl Default for Sampling {
    /// The most likely tokens.
    fn default() -> Sampling {
        Sampling {
            temperature: 0.0,
            top_p: 1.0,
            top_k: usize::MAX,
            repetition_penalty: 1.0,
            max_new_tokens: MAX_NEW_TOKENS,
            seed: 42,
            frequency_penalty: 0.0,
            presence_penalty: 0.0,
            logit_bias: BTreeMap::new(),
            stop: Vec::new(),
            ignore_eos: false,
            logprobs: None,
        }
    }
}

impl Sampling {
    /// What the command line says, then the model's `generation_config.json`.
    ///
    /// # Errors
    /// A number out of range, with its flag or file.
    pub fn of(args: &SamplingOptions, model: &Path) -> Result<Sampling> {
        let path = model.join("generation_config.json");
        let config = read_json(&path)?;
        let number = |name: &str| config.get(name).and_then(Value::as_f64);
        let samples = config.get("do_sample").and_then(Value::as_bool).unwrap_or(false);
        let asked = args.top_p.is_some() || args.top_k.is_some();
        let temperature = if samples || asked { number("temperature").unwrap_or(1.0) } else { 0.0 };
        // In transformers, too, 0 stands for none.
        let some = |k: usize| if k == 0 { usize::MAX } else { k };
        let plain = Sampling::default();
        let sampling = Sampling {
            temperature: args.temperature.unwrap_or(temperature),
            top_p: args.top_p.or(number("top_p")).unwrap_or(plain.top_p),
            top_k: some(args.top_k.or(number("top_k").map(|k| k as usize)).unwrap_or(0)),
            repetition_penalty: args.repetition_penalty.or(number("repetition_penalty")).unwrap_or(1.0),
            max_new_tokens: args
                .max_new_tokens
                .or(number("max_new_tokens").map(|n| n as usize))
                .unwrap_or(plain.max_new_tokens),
            seed: args.seed,
            ..plain
        };
        let of_file = path.display().to_string();
        let checks = [
            ("temperature", sampling.temperature, 0.0..=f64::MAX, args.temperature.is_some()),
            ("top_p", sampling.top_p, f64::MIN_POSITIVE..=1.0, args.top_p.is_some()),
            (
                "repetition_penalty",
                sampling.repetition_penalty,
                f64::MIN_POSITIVE..=f64::MAX,
                args.repetition_penalty.is_some(),
            ),
            ("max_new_tokens", sampling.max_new_tokens as f64, 1.0..=f64::MAX, args.max_new_tokens.is_some()),
        ];
        match checks.into_iter().find(|(_, value, range, _)| !range.contains(value)) {
            Some((name, value, _, true)) => {
                Err(Error::input(format!("{value} is out of range")).at(format!("--{}", name.replace('_', "-"))))
            }
            Some((name, value, _, false)) => Err(Error::input(format!("{name} is {value}, out of range")).at(of_file)),
            None => Ok(sampling),
        }
    }
}

/// Draws the tokens of one answer.
pub struct Sampler {
    sampling: Sampling,
    rng: ChaCha8Rng,
}

impl Sampler {
    /// Begins at the seed.
    pub fn new(sampling: &Sampling) -> Sampler {
        Sampler { sampling: sampling.clone(), rng: ChaCha8Rng::seed_from_u64(sampling.seed) }
    }

    /// The token after `before`, of which the first `prompt` are not the answer's, from its logits; with its log-prob where that is wanted.
    ///
    /// # Errors
    /// Logits that are NaN.
    pub fn draw(&mut self, logits: Vec<f32>, before: &[u32], prompt: usize) -> Result<(u32, Option<TokenLogProb>)> {
        let raw = self.sampling.logprobs.map(|count| (count, logits.clone()));
        let id = self.choose(logits, before, prompt)?;
        let logprob = raw.map(|(count, logits)| {
            let most = highest(&logits);
            let all = logits.iter().map(|logit| f64::from(logit - most).exp()).sum::<f64>().ln() + f64::from(most);
            let of = |id: u32| (f64::from(logits[id as usize]) - all) as f32;
            TokenLogProb {
                id,
                logprob: of(id),
                top: likeliest(&logits, count).into_iter().map(|id| (id, of(id))).collect(),
            }
        });
        Ok((id, logprob))
    }

    fn choose(&mut self, mut logits: Vec<f32>, before: &[u32], prompt: usize) -> Result<u32> {
        // Without an early end, which would keep the compiler from vectors.
        if logits.iter().fold(false, |any, l| any | l.is_nan()) {
            return Err(
                Error::run("the model's logits are NaN").help("a weight of the model or of the adapter is broken")
            );
        }
        let Sampling { temperature, top_p, top_k, repetition_penalty, .. } = self.sampling;
        if repetition_penalty != 1.0 {
            for id in before.iter().collect::<BTreeSet<_>>() {
                let Some(logit) = logits.get_mut(*id as usize) else { continue };
                let penalty = repetition_penalty as f32;
                *logit = if *logit > 0.0 { *logit / penalty } else { *logit * penalty };
            }
        }
        let Sampling { frequency_penalty, presence_penalty, .. } = self.sampling;
        if (frequency_penalty, presence_penalty) != (0.0, 0.0) {
            let mut counts = BTreeMap::<u32, f64>::new();
            before[prompt..].iter().for_each(|id| *counts.entry(*id).or_default() += 1.0);
            for (id, count) in counts {
                let Some(logit) = logits.get_mut(id as usize) else { continue };
                *logit -= (frequency_penalty * count + presence_penalty) as f32;
            }
        }
        for (id, bias) in &self.sampling.logit_bias {
            logits.get_mut(*id as usize).into_iter().for_each(|logit| *logit += bias);
        }
        if temperature == 0.0 {
            let most = highest(&logits);
            let first = logits.iter().position(|logit| *logit == most);
            return first.map(|id| id as u32).ok_or_else(|| Error::run("the model has no tokens"));
        }
        let most = f64::from(highest(&logits));
        let weight = |id: &u32| ((f64::from(logits[*id as usize]) - most) / temperature).exp();
        let sum = |ids: &[u32]| ids.iter().map(weight).sum::<f64>();
        let few = top_k < logits.len();
        let mut ids = if few { likeliest(&logits, top_k) } else { (0..logits.len() as u32).collect() };
        if top_p < 1.0 {
            // As few as reach the probability, and the one that does: they are looked for among more and more tokens.
            let (enough, mut count) = (top_p * sum(&ids), FEW);
            loop {
                if !few {
                    ids = likeliest(&logits, count);
                }
                let mut reached = 0.0;
                let last = ids.iter().position(|id| {
                    reached += weight(id);
                    reached >= enough
                });
                ids.truncate(last.map_or(ids.len(), |at| at + 1));
                if few || last.is_some() || count >= logits.len() {
                    break;
                }
                count *= FEW;
            }
        }
        let mut left = self.rng.random::<f64>() * sum(&ids);
        let drawn = ids.iter().find(|id| {
            left -= weight(id);
            left < 0.0
        });
        drawn.or(ids.last()).copied().ok_or_else(|| Error::run("the model has no tokens"))
    }
}

/// The highest logit. The GPU waits for what is drawn: maxima of lanes, which the compiler makes vectors, take a sixth of the time.
fn highest(logits: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; 16];
    let pieces = logits.chunks_exact(lanes.len());
    let rest = pieces.remainder().iter().copied().fold(f32::NEG_INFINITY, f32::max);
    for piece in pieces {
        lanes.iter_mut().zip(piece).for_each(|(lane, logit)| *lane = if *logit > *lane { *logit } else { *lane });
    }
    lanes.into_iter().fold(rest, f32::max)
}

/// The `count` likeliest tokens, likely ones first; of equals the first, as torch's argmax has it.
fn likeliest(logits: &[f32], count: usize) -> Vec<u32> {
    // So many pieces have a logit that is as high as the last of so many of their maxima.
    let mut maxima: Vec<f32> = logits.chunks(PIECE).map(highest).collect();
    let least = if count < maxima.len() {
        *maxima.select_nth_unstable_by(count, |a, b| b.total_cmp(a)).1
    } else {
        f32::NEG_INFINITY
    };
    let high = (0..).zip(logits).filter(|(_, logit)| **logit >= least);
    let mut ids: Vec<u32> = high.map(|(id, _)| id).collect();
    let likelier = |a: &u32, b: &u32| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b));
    if count < ids.len() {
        ids.select_nth_unstable_by(count, likelier);
        ids.truncate(count);
    }
    ids.sort_unstable_by(likelier);
    ids
}

/// Logits of a piece.
const PIECE: usize = 256;

/// Tokens among which a probability is looked for at first, and how many times more then.
const FEW: usize = 32;

#[cfg(test)]
mod tests {
    use super::*;

    /// How often each token is drawn.
    fn counts(sampling: Sampling, logits: &[f32], before: &[u32]) -> Vec<usize> {
        let mut sampler = Sampler::new(&sampling);
        let mut counts = vec![0; logits.len()];
        (0..4000).for_each(|_| counts[sampler.draw(logits.to_vec(), before, 0).unwrap().0 as usize] += 1);
        counts
    }

    fn drawn(counts: &[usize]) -> Vec<usize> {
        (0..counts.len()).filter(|id| counts[*id] > 0).collect()
    }

    const LOGITS: [f32; 5] = [1.0, 3.0, 2.0, -1.0, 3.0];

    #[test]
    fn without_temperature_the_first_of_the_likeliest() {
        assert_eq!(drawn(&counts(Sampling::default(), &LOGITS, &[])), [1]);
        // A token that was there is less likely, whatever the sign of its logit.
        let penalty = Sampling { repetition_penalty: 2.0, ..Sampling::default() };
        assert_eq!(drawn(&counts(penalty.clone(), &LOGITS, &[1, 1])), [4]);
        assert_eq!(drawn(&counts(penalty, &[-1.0, -1.5], &[0])), [1]);
        let mut sampler = Sampler::new(&Sampling::default());
        assert!(sampler.draw(vec![1.0, f32::NAN], &[], 0).is_err());
    }

    #[test]
    fn the_likeliest_are_found_among_many() {
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        for count in [1, 15, 16, 17, 255, 257, 5000] {
            // Few values, so that many are equal.
            let logits: Vec<f32> = (0..count).map(|_| rng.random_range(-40..40) as f32).collect();
            let mut ids: Vec<u32> = (0..count).collect();
            ids.sort_by(|a, b| logits[*b as usize].total_cmp(&logits[*a as usize]));
            let drawn = |top_k| {
                let sampling = Sampling { temperature: 1e9, top_k, ..Sampling::default() };
                drawn(&counts(sampling, &logits, &[])).into_iter().map(|id| id as u32).collect::<Vec<_>>()
            };
            assert_eq!(Sampler::new(&Sampling::default()).draw(logits.clone(), &[], 0).unwrap().0, ids[0]);
            for top_k in [1, 3, 12] {
                let mut expected = ids[..top_k.min(ids.len())].to_vec();
                expected.sort_unstable();
                assert_eq!(drawn(top_k), expected, "{top_k} of {count}");
            }
        }
    }

    #[test]
    fn half_the_probability_is_half_of_equal_tokens() {
        let half = Sampling { temperature: 1.0, top_p: 0.5, ..Sampling::default() };
        let drawn = drawn(&counts(half, &[0.5; 5000], &[]));
        assert!(drawn.iter().all(|id| *id < 2500) && drawn.iter().any(|id| *id > 2400), "{drawn:?}");
    }

    #[test]
    fn draws_follow_the_probabilities() {
        let warm = Sampling { temperature: 2.0, ..Sampling::default() };
        let weights: Vec<f64> = LOGITS.iter().map(|l| (f64::from(*l) / 2.0).exp()).collect();
        let all: f64 = weights.iter().sum();
        let counts = counts(warm, &LOGITS, &[]);
        for (count, weight) in counts.iter().zip(weights) {
            assert!((*count as f64 / 4000.0 - weight / all).abs() < 0.03, "{counts:?}");
        }
    }

    #[test]
    fn few_are_drawn_from() {
        let warm = Sampling { temperature: 5.0, ..Sampling::default() };
        assert_eq!(drawn(&counts(Sampling { top_k: 3, ..warm.clone() }, &LOGITS, &[])), [1, 2, 4]);
        assert_eq!(drawn(&counts(Sampling { top_k: 1, ..warm.clone() }, &LOGITS, &[])), [1]);
        // At temperature 1 the two likeliest have 0.397 each, the third 0.146.
        let cool = Sampling { temperature: 1.0, ..Sampling::default() };
        assert_eq!(drawn(&counts(Sampling { top_p: 0.79, ..cool.clone() }, &LOGITS, &[])), [1, 4]);
        assert_eq!(drawn(&counts(Sampling { top_p: 0.9, ..cool.clone() }, &LOGITS, &[])), [1, 2, 4]);
        assert_eq!(drawn(&counts(Sampling { top_p: 1e-9, ..cool }, &LOGITS, &[])), [1]);
        assert_eq!(counts(warm.clone(), &LOGITS, &[]), counts(warm, &LOGITS, &[]));
    }

    #[test]
    fn the_answer_s_own_tokens_are_penalised() {
        let drawn = |sampling: Sampling, before: &[u32]| drawn(&counts(sampling, &LOGITS, before));
        let often = Sampling { frequency_penalty: 0.6, ..Sampling::default() };
        assert_eq!(drawn(often.clone(), &[1]), [4]);
        assert_eq!(drawn(often.clone(), &[1, 4]), [1]);
        assert_eq!(drawn(often, &[1, 1, 4, 4]), [2]);
        let present = Sampling { presence_penalty: 0.6, ..Sampling::default() };
        assert_eq!(drawn(present, &[1, 1, 1, 4]), [1]);
        let mut of_prompt = Sampler::new(&Sampling { presence_penalty: 9.0, ..Sampling::default() });
        assert_eq!(of_prompt.draw(LOGITS.to_vec(), &[1, 4], 1).unwrap().0, 1);
        let biased = Sampling { logit_bias: BTreeMap::from([(3, 5.0), (9, 100.0)]), ..Sampling::default() };
        assert_eq!(drawn(biased, &[]), [3]);
    }

    #[test]
    fn log_probs_are_those_of_the_model() {
        let sampling = Sampling { logprobs: Some(2), logit_bias: BTreeMap::from([(0, 9.0)]), ..Sampling::default() };
        let (id, logprob) = Sampler::new(&sampling).draw(LOGITS.to_vec(), &[], 0).unwrap();
        let all: f64 = LOGITS.iter().map(|l| f64::from(*l).exp()).sum::<f64>().ln();
        let (of, logprob) = (|l: f64| (l - all) as f32, logprob.unwrap());
        assert_eq!((id, logprob.id, logprob.logprob), (0, 0, of(1.0)));
        assert_eq!(logprob.top, [(1, of(3.0)), (4, of(3.0))]);
    }

    #[test]
    fn flags_win_over_the_model() {
        let folder = tempfile::tempdir().unwrap();
        let of = |args: SamplingOptions| Sampling::of(&args, folder.path());
        assert_eq!(of(SamplingOptions { seed: 42, ..SamplingOptions::default() }).unwrap(), Sampling::default());
        let asked = of(SamplingOptions { top_k: Some(7), ..SamplingOptions::default() }).unwrap();
        assert_eq!((asked.temperature, asked.top_k), (1.0, 7));
        let config =
            r#"{"do_sample": true, "temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05}"#;
        std::fs::write(folder.path().join("generation_config.json"), config).unwrap();
        let asked =
            of(SamplingOptions { top_p: Some(0.5), max_new_tokens: Some(9), ..SamplingOptions::default() }).unwrap();
        let expected = Sampling {
            temperature: 0.7,
            top_p: 0.5,
            top_k: 20,
            repetition_penalty: 1.05,
            max_new_tokens: 9,
            seed: 0,
            ..Sampling::default()
        };
        assert_eq!(asked, expected);
        let wrong = of(SamplingOptions { temperature: Some(-1.0), ..SamplingOptions::default() }).unwrap_err();
        assert!(wrong.to_string().contains("--temperature"), "{wrong}");
    }
}
