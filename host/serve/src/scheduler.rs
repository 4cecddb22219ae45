//! The loop that computes: answers begin as sequences become free, and all of them go on together, token by token ("continuous batching",
//! Yu et al. 2022, "Orca").

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use dpo_core::console;
use dpo_core::error::Error;
use dpo_generate::{Answer, Generator, Sampling, Stop, TokenLogProb};
use tokio::sync::mpsc::UnboundedSender;

/// Answers that wait for a sequence at most.
const WAITING: usize = 1024;
/// How often a server that is idle looks whether it is to end.
const IDLE: Duration = Duration::from_millis(100);
/// How often it says what it does.
const REPORT: Duration = Duration::from_secs(10);

/// An answer that is asked for.
pub(super) struct Job {
    pub prompt: Vec<u32>,
    pub adapter: Option<usize>,
    pub sampling: Sampling,
    /// Which of the request's answers it is.
    pub choice: usize,
    pub events: UnboundedSender<(usize, Event)>,
}

/// What becomes of an answer.
pub(super) enum Event {
    /// Further text, and the log-probs of the tokens that came, where they are wanted.
    Text(String, Vec<TokenLogProb>),
    /// It ended: why, and with how many tokens.
    End(Stop, usize),
    Failed(Error),
}

/// Where requests put their answers.
#[derive(Clone)]
pub(super) struct Queue {
    jobs: Sender<Job>,
    waiting: Arc<AtomicUsize>,
}

/// Where the loop finds them.
pub(super) struct Jobs {
    jobs: Receiver<Job>,
    waiting: Arc<AtomicUsize>,
}

pub(super) fn queue() -> (Queue, Jobs) {
    let ((sender, receiver), waiting) = (channel(), Arc::new(AtomicUsize::new(0)));
    (Queue { jobs: sender, waiting: waiting.clone() }, Jobs { jobs: receiver, waiting })
}

impl Queue {
    /// Has answers wait; whether there is room for them.
    pub(super) fn put(&self, jobs: Vec<Job>) -> bool {
        let count = jobs.len();
        if self.waiting.fetch_add(count, Ordering::Relaxed) + count > WAITING {
            self.waiting.fetch_sub(count, Ordering::Relaxed);
            return false;
        }
        jobs.into_iter().all(|job| self.jobs.send(job).is_ok())
    }
}

/// An answer that goes on.
struct Active {
    answer: Answer,
    choice: usize,
    told: usize,
    events: UnboundedSender<(usize, Event)>,
}

/// Answers what is asked for until `stop` says so; what goes on then is told that it is interrupted.
pub(super) fn run(generator: &mut Generator, jobs: &Jobs, stop: impl Fn() -> bool) {
    let (mut waiting, mut active) = (VecDeque::<Job>::new(), Vec::<Active>::new());
    let mut report = Report::new();
    while !stop() {
        if active.is_empty() && waiting.is_empty() {
            match jobs.jobs.recv_timeout(IDLE) {
                Ok(job) => waiting.push_back(job),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => break,
            }
        }
        waiting.extend(jobs.jobs.try_iter());
        // Clients that have gone are not answered.
        active.retain(|one| !one.events.is_closed());
        while generator.free() > 0
            && let Some(job) = waiting.pop_front()
        {
            jobs.waiting.fetch_sub(1, Ordering::Relaxed);
            if job.events.is_closed() {
                continue;
            }
            match generator.begin(job.adapter, job.prompt, &job.sampling) {
                Ok(answer) => active.push(Active { answer, choice: job.choice, told: 0, events: job.events }),
                Err(e) => drop(job.events.send((job.choice, Event::Failed(e)))),
            }
        }
        let mut answers: Vec<&mut Answer> = active.iter_mut().map(|one| &mut one.answer).collect();
        let results = generator.step_all(&mut answers);
        for (one, result) in active.iter_mut().zip(results) {
            one.tell(result);
            report.tokens += one.answer.ids().len() - one.told;
            one.told = one.answer.ids().len();
        }
        active.retain(|one| one.answer.stop().is_none());
        report.tell(active.len(), waiting.len());
    }
    for mut one in active {
        let rest = generator.interrupt(&mut one.answer);
        one.tell(Ok(rest));
    }
}

impl Active {
    /// Tells the request what came. A client that has gone is noticed in the next turn.
    fn tell(&mut self, result: Result<Option<String>, Error>) {
        let send = |event| drop(self.events.send((self.choice, event)));
        match result {
            Err(e) => return send(Event::Failed(e)),
            Ok(text) => {
                let logprobs = self.answer.logprobs().get(self.told..).unwrap_or_default().to_vec();
                let text = text.unwrap_or_default();
                if !text.is_empty() || !logprobs.is_empty() {
                    send(Event::Text(text, logprobs));
                }
            }
        }
        if let Some(stop) = self.answer.stop() {
            send(Event::End(stop, self.answer.ids().len()));
        }
    }
}

/// What the console is told while answers come.
struct Report {
    since: Instant,
    tokens: usize,
}

impl Report {
    fn new() -> Report {
        Report { since: Instant::now(), tokens: 0 }
    }

    fn tell(&mut self, active: usize, waiting: usize) {
        let seconds = self.since.elapsed();
        if seconds < REPORT {
            return;
        }
        if self.tokens > 0 {
            let speed = self.tokens as f64 / seconds.as_secs_f64();
            console::line(format!("{active} answers, {waiting} waiting, {speed:.1} tokens/s"));
        }
        *self = Report::new();
    }
}
