//! "Whatever the disk does, at whichever operation": every I/O index of a journal's life, times every fault. Nothing that
//! was acknowledged is lost, nothing that was refused comes back, no two records stand at one place, and the journal goes
//! on by itself or says what to run.

mod journal_support;
#[path = "journal_support/matrix.rs"]
mod matrix;

use journal_support::Choices;
use journal_support::mem_disk::{Fault, Left, MemDisk};
use matrix::{Life, NextLife};

/// Power cuts that leave something are tried with so many choices each.
const SEEDS: u64 = 6;

/// Operations, and calls that read, of a life without a fault.
fn size() -> (u64, u64) {
    let disk = MemDisk::for_matrix();
    let mut life = Life::new(disk.clone());
    life.live();
    life.check("without a fault");
    assert!(life.errors.is_empty(), "{:?}", life.errors);
    let (mut ops, mut reads) = (0, 0);
    disk.set(|s| (ops, reads) = (s.ops, s.reads));
    (ops, reads)
}

#[test]
fn every_operation_may_fail_once_or_for_lack_of_space() {
    let (ops, reads) = size();
    let faults = [Fault::Error, Fault::ErrorAfter, Fault::Short, Fault::Full, Fault::FullFromHere, Fault::LyingSync];
    let (mut runs, mut met, mut helped) = (0, 0, 0);
    let nexts = [NextLife::GoesOn, NextLife::PowerCutAfterwards, NextLife::KilledAtOnce];
    for fault in faults {
        for at in 1..=ops {
            for next in nexts {
                let what = format!("{fault:?} at operation {at}, {next:?}");
                let disk = MemDisk::for_matrix();
                disk.set(|s| s.fault = Some((at, fault)));
                let life = Life::new(disk).with(next).lived(&what);
                (runs, met, helped) = (runs + 1, met + u32::from(!life.errors.is_empty()), helped + life.recovered);
            }
        }
    }
    for at in 1..=reads {
        for next in nexts {
            let what = format!("a read fails, {at}, {next:?}");
            let disk = MemDisk::for_matrix();
            disk.set(|s| s.read_fault = Some(at));
            let life = Life::new(disk).with(next).lived(&what);
            (runs, met) = (runs + 1, met + u32::from(!life.errors.is_empty()));
        }
    }
    eprintln!(
        "journal matrix: {ops} operations and {reads} reads x 6 faults x 3 continuations: {runs} runs, {met} with an error told, {helped} recovered without a restart"
    );
    assert!(ops > 150 && reads > 50, "{ops} operations, {reads} reads");
    assert!(met > runs / 3 && helped > 100, "the faults are met: {met} of {runs}, {helped}");
}

#[test]
fn power_may_go_at_every_operation_and_again_while_starting() {
    let (ops, _) = size();
    let (mut runs, mut again, mut heads) = (0, 0, 0);
    for at in 0..=ops {
        for left in [Left::Nothing, Left::Writes, Left::Sectors, Left::TornSectors] {
            let seeds = if left == Left::Nothing { 1 } else { SEEDS };
            for seed in 0..seeds {
                let what = format!("power goes at operation {at}, {left:?}, seed {seed}");
                let disk = MemDisk::for_matrix();
                disk.set(|s| s.dead_from = Some(at));
                let mut life = Life::new(disk.clone());
                life.live();
                let mut choices = Choices(at * 1000 + seed);
                disk.power_cut_leaves(left, &mut choices);
                runs += 1;
                if seed == 0 {
                    // And at every operation of the start that follows.
                    for second in 0.. {
                        let copy = disk.copy();
                        copy.set(|s| s.dead_from = Some(s.ops + second));
                        let mut life = life.on(&copy);
                        // Through, or refused for another reason than the power.
                        let through = life.starts() || !copy.is_dead();
                        copy.power_cut_leaves(left, &mut choices);
                        life.check(&format!("{what}, and again {second} operations into the start"));
                        (runs, again) = (runs + 1, again + 1);
                        if through {
                            break;
                        }
                    }
                }
                life.check(&what);
                heads += life.heads_remade;
                // What a start has shown is on the disk.
                disk.power_cut_leaves(Left::Nothing, &mut choices);
                life.check(&format!("{what}, and once more"));
            }
        }
    }
    eprintln!(
        "journal matrix: {ops} operations x power cuts: {runs} runs, {again} of them twice, {heads} heads remade as the program says"
    );
    assert!(again > ops, "starts were cut too: {again}");
}
