//! Files go up into a repository of a hub, as one commit.
//!
//! Both hubs do it in the same steps: the repository is made, its files are compared, large ones are sent as objects of git LFS
//! (`objects.rs`), and a commit names all of them, with small ones in it. What differs is in `hugging_face.rs` and `modelscope.rs`.
//! A push that broke off is begun again and goes on: objects that the hub has are not sent again.

mod hugging_face;
mod modelscope;
mod objects;
mod source;

use dpo_core::console;
use dpo_core::error::{Error, Result};
use dpo_core::memory::size;
use sha2::{Digest, Sha256};

use super::client::{self, Client, Failure, Payload, Reply, patiently};
use super::{Content as Kind, Name};
pub use source::{Content, Source};

/// What a push is to do.
pub struct Terms {
    /// A repository that is made is seen by its owner alone.
    pub private: bool,
    /// The commit's message.
    pub message: String,
    /// The license that the card states, if any.
    pub license: Option<String>,
    /// A card that somebody else wrote is written over.
    pub overwrite_card: bool,
}

/// What came of a push.
pub struct Pushed {
    /// The page of the repository.
    pub page: String,
    /// Files that are new or changed.
    pub files: usize,
}

/// How a file goes up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    /// It is there as it is here.
    Same,
    /// Its bytes are in the commit.
    Inline,
    /// The commit has its hash, and its bytes go before as an object.
    Object,
    /// The repository's `.gitignore` keeps it out.
    Ignored,
}

/// A repository as a hub has it.
trait Repository {
    /// Whether it is there, and whether everybody sees it, if that is told.
    fn find(&self) -> Result<Option<Option<bool>>>;
    /// Makes it.
    fn create(&self, terms: &Terms) -> Result<()>;
    /// Makes the branch that is meant where it is not there and can be made.
    fn branch(&self) -> Result<()>;
    /// How each file goes up.
    fn modes(&self, files: &[&Source]) -> Result<Vec<Mode>>;
    /// Where objects are announced.
    fn objects(&self) -> objects::Place;
    /// Makes the commit.
    fn commit(&self, files: &[(&Source, Mode)], message: &str) -> std::result::Result<(), Failure>;
    /// The page that shows it.
    fn page(&self) -> String;
}

/// Sends files into a repository, which is made if it is not there. `card` is a card and what it shows: they stay here where the
/// repository has a card that was not written by a push.
///
/// # Errors
/// No token, or one without the right; a hub that cannot be reached or refuses something; a file that changes meanwhile.
pub fn push(name: &Name, files: &[Source], card: &[Source], terms: &Terms) -> Result<Pushed> {
    let at = |e: Error| e.at(name.place());
    if client::offline() {
        return Err(at(Error::input("nothing can be pushed offline").help("HF_HUB_OFFLINE is set: unset it")));
    }
    let client = Client::of(name.hub)?;
    if !client.has_token() {
        let help = format!("set {} to a token that may write: {}", name.hub.token, name.hub.tokens);
        return Err(at(Error::input("there is no token").help(help)));
    }
    let repository: Box<dyn Repository + '_> = match name.hub.layout {
        super::protocol::Layout::Blobs => Box::new(hugging_face::HuggingFace { client: &client, name }),
        super::protocol::Layout::Plain => Box::new(modelscope::ModelScope { client: &client, name }),
    };
    let is_new = match repository.find().map_err(at)? {
        None => {
            repository.create(terms).map_err(at)?;
            console::line(format!("made        {}", repository.page()));
            true
        }
        Some(Some(true)) if terms.private => {
            return Err(at(Error::input("is there already, and everybody sees it: --private is for one that is made")
                .help("make it private on its page, name another one, or leave --private out")));
        }
        Some(_) => false,
    };
    repository.branch().map_err(at)?;
    let takes_card = is_new || card.is_empty() || terms.overwrite_card || is_ours(&client, name, card).map_err(at)?;
    if !takes_card {
        console::warning(
            console::Remark::from("the repository has a card of its own, README.md, which stays")
                .help("--overwrite-card puts the new card in its place"),
        );
    }
    let all: Vec<&Source> = files.iter().chain(card.iter().filter(|_| takes_card)).collect();
    let mut ignored_told = false;
    // A commit whose answer was lost may have been made: the next try finds nothing left to do.
    let changed = patiently(|| {
        let modes = repository.modes(&all)?;
        let ignored: Vec<&str> =
            all.iter().zip(&modes).filter(|(_, m)| **m == Mode::Ignored).map(|(f, _)| f.path()).collect();
        if !ignored.is_empty() && !std::mem::replace(&mut ignored_told, true) {
            console::warning(format!("the repository's .gitignore keeps out {}", ignored.join(", ")));
        }
        let goes = |m: &Mode| matches!(m, Mode::Inline | Mode::Object);
        let changed: Vec<(&Source, Mode)> = all.iter().copied().zip(modes).filter(|(_, m)| goes(m)).collect();
        if changed.is_empty() {
            return Ok(0);
        }
        let large: Vec<&Source> = changed.iter().filter(|(_, m)| *m == Mode::Object).map(|(f, _)| *f).collect();
        objects::send(&client, name, &repository.objects(), &large)?;
        all.iter().try_for_each(|file| file.unchanged())?;
        repository.commit(&changed, &terms.message)?;
        Ok(changed.len())
    });
    Ok(Pushed { page: repository.page(), files: changed.map_err(at)? })
}

/// Whether the card that a repository has is this one, or one that a push wrote and nobody changed, or there is none.
fn is_ours(client: &Client, name: &Name, card: &[Source]) -> Result<bool> {
    let path = (name.hub.file)(name, Kind::Model, &name.revision, CARD);
    match client.text(&format!("{}{path}", (name.hub.endpoint)()))? {
        Some(text) => {
            let is_this = |file: &Source| Ok(file.path() == CARD && file.head(u64::MAX)? == text.as_bytes());
            let this = card.iter().map(is_this).collect::<Result<Vec<bool>>>()?;
            Ok(this.contains(&true) || signed(&text).is_some_and(|(card, signature)| signature == sign(card)))
        }
        None => Ok(true),
    }
}

/// A card with a signature, by which a later push knows that nobody has changed it.
pub fn signed_card(text: &str) -> String {
    format!("{text}{BEGIN}{}{END}", sign(text))
}

/// The file that is a repository's card.
pub const CARD: &str = "README.md";

const BEGIN: &str = "\n<!-- dpo-host push ";
const END: &str = " -->\n";

/// A card's text, and the signature under it.
fn signed(text: &str) -> Option<(&str, &str)> {
    let (card, rest) = text.rsplit_once(BEGIN)?;
    Some((card, rest.trim_end().strip_suffix(END.trim_end())?))
}

fn sign(text: &str) -> String {
    Sha256::digest(text).iter().take(8).map(|byte| format!("{byte:02x}")).collect()
}

/// Sends JSON, patiently.
fn post(client: &Client, address: &str, body: &serde_json::Value) -> Result<Reply> {
    patiently(|| post_bytes(client, address, &[("content-type", "application/json")], body.to_string().as_bytes()))
}

/// Sends bytes once.
fn post_bytes(
    client: &Client,
    address: &str,
    headers: &[(&str, &str)],
    bytes: &[u8],
) -> std::result::Result<Reply, Failure> {
    let payload = Payload { length: bytes.len() as u64, open: &|| Ok(Box::new(bytes)) };
    client.send(ureq::http::Method::POST, address, headers, &payload)
}

/// What a hub's refusal means for who pushes. `what` was refused.
fn refused(name: &Name, what: &str, reply: &Reply) -> Error {
    let (status, hub) = (reply.status, name.hub);
    let said = format!("({status}: {})", reply.message.trim());
    let error = match status {
        401 => Error::input(format!("the hub does not know this token {said}"))
            .help(format!("set {} to a token that may write: {}", hub.token, hub.tokens)),
        402 | 403 => Error::input(format!("the token's account may not do this: {what} {said}"))
            .help(format!("is the owner right? the token has to be one that may write: {}", hub.tokens)),
        404 => Error::input(format!("there is no such repository or branch: {what} {said}"))
            .help("is the name right, and the branch? a repository is owner/name"),
        400..=499 => Error::input(format!("the hub refuses this: {what} {said}")),
        _ => Error::run(format!("an unknown kind of answer to this: {what} {said}")),
    };
    error.at(name.place())
}

/// A size as a person reads it.
fn amount(bytes: u64) -> String {
    size(bytes as usize)
}
