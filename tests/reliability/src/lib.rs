//! The reliability machine: scripts, a model of what a disk may hold, and the parts that run the one
//! against the other. `docs/testing.md` says how they fit together.
//!
//! | module | what |
//! |---|---|
//! | [`parts`], [`run`] | what the program runs, and how it prints figures and writes them down |
//! | [`fuzz`], [`targets`] | inputs that a seed breaks, and what they are given to |
//! | [`kills`] | processes that are killed while they write |
//! | [`mutants`], [`hunters`] | mistakes in the product, and who must notice them |
//! | [`part`], [`parallel`] | a part and its figures; work items on all cores |
//! | [`play`] | a script on a simulated disk, from the empty image to the closed one |
//! | [`judge`] | the oracles |
//! | [`files`] | a script on real files |
//! | [`load`] | sends a script's requests, many at once, and asks the model about each |
//! | [`request`], [`changes`] | one of them; transactions of the graph |
//! | [`script`] | the language: settings and operations, as values and as text |
//! | [`swarm`], [`scripts`] | scripts that a seed draws; scripts in files |
//! | [`model`] | what a byte of the disk may read as, now and after a power cut |
//! | [`seeds`] | part: the whole stack by seed |
//! | [`threads`] | part: real threads and a real file |
//! | [`exhaustive`] | part: every sequence of a few operations, cut at every write |
//! | [`faults`] | part: every request to the file fails |
//! | [`power_cuts`] | part: the power goes at every write |
//! | [`outside`] | parts that are programs of their own |
//! | [`crash`] | the states that a power cut may leave |
//! | [`sim`], [`session`] | contexts in virtual and in real time |
//! | [`image`], [`compressed`] | empty images; the compressed clusters that some begin with |
//! | [`layers`] | the images of a chain that snapshots make |
//! | [`soundness`], [`peer`] | our check; the reference's tools |
//! | [`rng`] | numbers that depend on a seed only |
//!
//! Everything here is deterministic: no wall clock, no addresses, no hasher with a random key, no
//! thread's identity decides anything.
#![allow(missing_docs, reason = "not published; fields whose names say it")]
#![allow(
    clippy::should_implement_trait,
    reason = "`next` of a generator of numbers, which has no end"
)]

pub mod changes;
pub mod compressed;
pub mod crash;
pub mod exhaustive;
pub mod faults;
pub mod files;
pub mod fuzz;
pub mod hunters;
pub mod image;
pub mod judge;
pub mod kept;
pub mod kills;
pub mod layers;
pub mod load;
pub mod model;
pub mod mutants;
pub mod outside;
pub mod parallel;
pub mod part;
pub mod parts;
pub mod peer;
pub mod play;
pub mod power_cuts;
pub mod request;
pub mod rng;
pub mod run;
pub mod script;
pub mod scripts;
pub mod seeds;
pub mod session;
pub mod sim;
pub mod soundness;
pub mod swarm;
pub mod targets;
pub mod threads;

// Pure files of the program, whose parsers are fuzzed here too.
#[path = "../../../tools/src/image_opts.rs"]
#[allow(dead_code, reason = "the program uses all of it")]
mod image_opts;
#[path = "../../../tools/src/json.rs"]
#[allow(dead_code, reason = "the program uses all of it")]
mod json;

// The mutator that knows the format.
#[path = "../../../qcow2/tests/support/mod.rs"]
mod images;
