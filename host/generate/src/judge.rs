//! A model that judges: which of two answers to a prompt is the better one, asked of any endpoint of OpenAI's chat completions.
//!
//! As in MT-Bench (Zheng et al. 2023, arXiv 2306.05685, sections 3.1 and 3.4): judges prefer what stands first, so each pair is
//! asked twice with positions swapped, and a win is what wins in both. Whatever else comes of the two is a tie.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError, mpsc};
use std::time::Duration;

use serde_json::{Value, json};
use ureq::Agent;

use dpo_core::error::{Error, Result};

/// What the judge is asked to do; after the prompt `pair-v2` of MT-Bench.
pub const INSTRUCTIONS: &str = "You are an impartial judge. Below are a user's question and the answers of two assistants. Decide which \
    answer serves the user better: whether it does what was asked, and is correct, helpful, relevant and clear. Neither the order of the \
    answers nor their length nor the names of the assistants should count. First compare the two in a few sentences. Then end with your \
    verdict in exactly this form: \"[[A]]\" if assistant A's answer is better, \"[[B]]\" if assistant B's is, \"[[C]]\" if they are equally good.";

/// Questions that are asked at once.
const AT_ONCE: usize = 8;
/// How often a question is asked, and the first pause between two tries; each further one is twice as long.
const TRIES: u32 = 4;
const PAUSE: Duration = Duration::from_millis(500);
/// The longest pause that a server may ask for.
const LONGEST_PAUSE: u64 = 120;
/// How long a judge may think.
const PATIENCE: Duration = Duration::from_secs(300);
/// Bytes of an answer.
const LONGEST: u64 = 4 << 20;

/// What a judge says of two answers in their order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The first is better.
    First,
    /// The second is better.
    Second,
    /// Neither is.
    Tie,
    /// It did not say.
    Unclear,
}

impl Verdict {
    /// The last verdict of a judge's text.
    pub fn of(text: &str) -> Verdict {
        let marks = [("[[A]]", Verdict::First), ("[[B]]", Verdict::Second), ("[[C]]", Verdict::Tie)];
        let found = marks.iter().filter_map(|(mark, verdict)| Some((text.rfind(mark)?, *verdict)));
        found.max_by_key(|(at, _)| *at).map_or(Verdict::Unclear, |(_, verdict)| verdict)
    }
}

/// What becomes of an answer against another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It was preferred in both positions.
    Win,
    /// It was preferred in neither, and the other in both.
    Loss,
    /// Everything else that was said.
    Tie,
    /// A verdict is missing.
    Unclear,
}

impl Outcome {
    /// Of the second answer, from the verdicts in this order and in the other one.
    pub fn of_second(order: Verdict, swapped: Verdict) -> Outcome {
        match (order, swapped) {
            (Verdict::Unclear, _) | (_, Verdict::Unclear) => Outcome::Unclear,
            (Verdict::Second, Verdict::First) => Outcome::Win,
            (Verdict::First, Verdict::Second) => Outcome::Loss,
            _ => Outcome::Tie,
        }
    }

    /// What files call it.
    pub fn name(self) -> &'static str {
        match self {
            Outcome::Win => "win",
            Outcome::Loss => "loss",
            Outcome::Tie => "tie",
            Outcome::Unclear => "unclear",
        }
    }

    /// The one of a name.
    pub fn named(name: &str) -> Option<Outcome> {
        [Outcome::Win, Outcome::Loss, Outcome::Tie, Outcome::Unclear].into_iter().find(|o| o.name() == name)
    }
}

/// How often an answer won.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Wins.
    pub wins: usize,
    /// Ties.
    pub ties: usize,
    /// Losses.
    pub losses: usize,
    /// Pairs without a verdict, which no rate counts.
    pub unclear: usize,
}

impl Tally {
    /// Counts outcomes.
    pub fn of(outcomes: impl Iterator<Item = Outcome>) -> Tally {
        outcomes.fold(Tally::default(), |mut tally, outcome| {
            *match outcome {
                Outcome::Win => &mut tally.wins,
                Outcome::Tie => &mut tally.ties,
                Outcome::Loss => &mut tally.losses,
                Outcome::Unclear => &mut tally.unclear,
            } += 1;
            tally
        })
    }

    /// The win rate, a tie being half a win, and its 95% interval by Wilson's score (1927), which stays within 0 and 1 and holds for
    /// few pairs as well. A tie varies less than a win and a loss do, so that the interval is rather too wide. None without a verdict.
    pub fn rate(&self) -> Option<(f64, [f64; 2])> {
        const Z: f64 = 1.959_963_984_540_054;
        let n = (self.wins + self.ties + self.losses) as f64;
        if n == 0.0 {
            return None;
        }
        let p = (self.wins as f64 + self.ties as f64 / 2.0) / n;
        let (centre, scale) = (p + Z * Z / (2.0 * n), 1.0 + Z * Z / n);
        let half = Z * (p * (1.0 - p) / n + Z * Z / (4.0 * n * n)).sqrt();
        Some((p, [(centre - half) / scale, (centre + half) / scale].map(|x| x.clamp(0.0, 1.0))))
    }
}

/// A question with two answers.
pub struct Pair<'a> {
    /// What was asked.
    pub prompt: &'a str,
    /// Two answers to it.
    pub answers: [&'a str; 2],
}

/// A judge at an address.
pub struct Judge {
    agent: Agent,
    address: String,
    model: String,
    key: Option<String>,
    /// Whether it takes a temperature; some models have none of their own choice.
    takes_temperature: AtomicBool,
}

/// How a try failed.
enum Failure {
    /// Another try may do, after a pause that the server may have named.
    Passing(String, Option<Duration>),
    Final(Error),
}

impl Judge {
    /// The model of an endpoint, such as `https://api.openai.com/v1`; the key goes to it alone.
    ///
    /// # Errors
    /// An address that is none.
    pub fn new(url: &str, model: &str, key: Option<String>) -> Result<Judge> {
        let parsed = url.parse::<ureq::http::Uri>().ok();
        let known =
            parsed.is_some_and(|uri| matches!(uri.scheme_str(), Some("http" | "https")) && uri.host().is_some());
        if !known {
            return Err(Error::input(format!("'{url}' is not an address"))
                .at("--judge")
                .help("such as https://api.openai.com/v1, or http://127.0.0.1:8000/v1 for a server of your own"));
        }
        let base = url.trim_end_matches('/');
        let address =
            if base.ends_with("/chat/completions") { base.into() } else { format!("{base}/chat/completions") };
        let (agent, takes_temperature) = (dpo_hub::agent(PATIENCE)?, AtomicBool::new(true));
        Ok(Judge { agent, address, model: model.to_owned(), key, takes_temperature })
    }

    /// Judges pairs, some at once, each in both orders; `tell` gets the place of a pair with the verdicts on its answers as they stand and
    /// swapped, in the order in which they come.
    ///
    /// # Errors
    /// The first that does not pass; what was judged before it was told.
    pub fn judge(&self, pairs: &[Pair<'_>], mut tell: impl FnMut(usize, [Verdict; 2]) -> Result<()>) -> Result<()> {
        let waiting = Mutex::new((0..pairs.len()).collect::<VecDeque<_>>());
        let (sender, receiver) = mpsc::channel();
        std::thread::scope(|scope| {
            for _ in 0..AT_ONCE.min(pairs.len()) {
                let (sender, waiting) = (sender.clone(), &waiting);
                scope.spawn(move || {
                    while let Some(at) = waiting.lock().unwrap_or_else(PoisonError::into_inner).pop_front() {
                        let Pair { prompt, answers: [a, b] } = &pairs[at];
                        let verdicts = self.ask(prompt, a, b).and_then(|order| Ok([order, self.ask(prompt, b, a)?]));
                        // After an error nobody listens.
                        if sender.send((at, verdicts)).is_err() {
                            break;
                        }
                    }
                });
            }
            drop(sender);
            let told = receiver.iter().try_for_each(|(at, verdicts)| tell(at, verdicts?));
            if told.is_err() {
                waiting.lock().unwrap_or_else(PoisonError::into_inner).clear();
            }
            drop(receiver);
            told
        })
    }

    /// What the judge says of two answers in this order.
    fn ask(&self, prompt: &str, a: &str, b: &str) -> Result<Verdict> {
        let mut tries = 0;
        loop {
            tries += 1;
            match self.attempt(prompt, a, b) {
                Ok(text) => return Ok(Verdict::of(&text)),
                Err(Failure::Final(error)) => return Err(error.at(&self.address)),
                Err(Failure::Passing(cause, _)) if tries == TRIES => {
                    return Err(Error::run(format!("the judge was asked {TRIES} times: {cause}"))
                        .at(&self.address)
                        .help("run it again: answers and verdicts that are there stay"));
                }
                Err(Failure::Passing(_, pause)) => std::thread::sleep(pause.unwrap_or(PAUSE * 2_u32.pow(tries - 1))),
            }
        }
    }

    fn attempt(&self, prompt: &str, a: &str, b: &str) -> std::result::Result<String, Failure> {
        let passing = |e: ureq::Error| Failure::Passing(e.to_string(), None);
        let with_temperature = self.takes_temperature.load(Ordering::Relaxed);
        let question = format!(
            "[User's question]\n{prompt}\n\n[Start of assistant A's answer]\n{a}\n[End of assistant A's answer]\n\n\
             [Start of assistant B's answer]\n{b}\n[End of assistant B's answer]"
        );
        let messages = json!([{"role": "system", "content": INSTRUCTIONS}, {"role": "user", "content": question}]);
        let mut body = json!({"model": self.model, "messages": messages});
        if with_temperature {
            body["temperature"] = json!(0);
        }
        let mut request = self.agent.post(&self.address).header("content-type", "application/json");
        if let Some(key) = &self.key {
            request = request.header("authorization", format!("Bearer {key}"));
        }
        let mut response = request.send(body.to_string()).map_err(passing)?;
        let asked = response.headers().get("retry-after").and_then(|v| v.to_str().ok()?.trim().parse().ok());
        let text = response.body_mut().with_config().limit(LONGEST).read_to_string().map_err(passing)?;
        let said = || text.chars().take(300).collect::<String>();
        match response.status().as_u16() {
            200..=299 => {
                let answer: Value = serde_json::from_str(&text).unwrap_or_default();
                match answer["choices"][0]["message"]["content"].as_str() {
                    Some(text) => Ok(text.to_owned()),
                    None if answer["choices"][0]["message"].is_object() => Ok(String::new()),
                    None => Err(Failure::Final(
                        Error::run(format!("this is no chat completion: {}", said()))
                            .help("is it an endpoint of OpenAI's chat completions? its address ends with /v1"),
                    )),
                }
            }
            400 if with_temperature && text.contains("temperature") => {
                self.takes_temperature.store(false, Ordering::Relaxed);
                self.attempt(prompt, a, b)
            }
            status @ (401 | 403) => Err(Failure::Final(
                Error::input(format!("the judge lets nobody in without a key that it knows ({status}): {}", said()))
                    .help("set OPENAI_API_KEY"),
            )),
            status @ (408 | 409 | 429 | 500..=599) => {
                let pause = asked.filter(|seconds| *seconds <= LONGEST_PAUSE).map(Duration::from_secs);
                Err(Failure::Passing(format!("{status}: {}", said()), pause))
            }
            status => Err(Failure::Final(
                Error::run(format!("the judge answers {status}: {}", said()))
                    .help("is the address right, and --judge-model one that it has?"),
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn verdicts_stand_at_the_end() {
        for (text, verdict) in [
            ("A is better. [[A]]", Verdict::First),
            ("not [[A]], but [[B]]", Verdict::Second),
            ("**[[C]]**", Verdict::Tie),
            ("[A] is better", Verdict::Unclear),
            ("", Verdict::Unclear),
        ] {
            assert_eq!(Verdict::of(text), verdict, "{text}");
        }
    }

    #[test]
    fn a_win_is_one_in_both_positions() {
        use Verdict::{First, Second, Tie, Unclear};
        for (order, swapped, outcome) in [
            (Second, First, Outcome::Win),
            (First, Second, Outcome::Loss),
            (First, First, Outcome::Tie),
            (Second, Second, Outcome::Tie),
            (Second, Tie, Outcome::Tie),
            (Tie, Tie, Outcome::Tie),
            (Second, Unclear, Outcome::Unclear),
            (Unclear, First, Outcome::Unclear),
        ] {
            assert_eq!(Outcome::of_second(order, swapped), outcome, "{order:?} {swapped:?}");
        }
    }

    /// Against scipy, `binomtest(k, n).proportion_ci(method="wilson")`.
    #[test]
    fn rates_have_intervals() {
        let tally = |wins, ties, losses| Tally { wins, ties, losses, unclear: 3 };
        for (tally, rate, [low, high]) in [
            (tally(7, 0, 3), 0.7, [0.396_778, 0.892_209]),
            (tally(0, 10, 0), 0.5, [0.236_593, 0.763_407]),
            (tally(60, 20, 20), 0.7, [0.604_152, 0.781_051]),
            (tally(5, 0, 0), 1.0, [0.565_518, 1.0]),
        ] {
            let (p, [l, h]) = tally.rate().unwrap_or_default();
            assert!((p - rate).abs() < 1e-12 && (l - low).abs() < 1e-5 && (h - high).abs() < 1e-5, "{p} {l} {h}");
        }
        assert_eq!(Tally { unclear: 2, ..Tally::default() }.rate(), None);
    }
}
