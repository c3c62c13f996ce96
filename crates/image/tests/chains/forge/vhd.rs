//! VHD: footers, header, table, bitmaps whose most significant bit comes first.

use super::{Canvas, Forged, Order, Sector};
use crate::dice::Dice;
use image::Kind;
use store::Store;
use uuid::Uuid;

const SECTOR: u64 = 512;

fn sum(bytes: &[u8], at: usize) -> [u8; 4] {
    let others = bytes[..at].iter().chain(&bytes[at + 4..]);
    (!others.fold(0_u32, |sum, byte| sum.wrapping_add((*byte).into()))).to_be_bytes()
}

fn footer(order: &Order, header_at: u64, dice: &mut Dice) -> Vec<u8> {
    let mut bytes = vec![0; 512];
    bytes[..8].copy_from_slice(b"conectix");
    bytes[8..12].copy_from_slice(&2_u32.to_be_bytes());
    bytes[12..16].copy_from_slice(&0x1_0000_u32.to_be_bytes());
    bytes[16..24].copy_from_slice(&header_at.to_be_bytes());
    bytes[24..28].copy_from_slice(&(dice.below(1 << 30) as u32).to_be_bytes());
    bytes[28..32].copy_from_slice(dice.pick(&[b"win ", b"tap\0", b"tnby", b"qem2"]));
    bytes[36..40].copy_from_slice(b"Wi2k");
    bytes[40..48].copy_from_slice(&order.size.to_be_bytes());
    bytes[48..56].copy_from_slice(&order.size.to_be_bytes());
    // A geometry that says something else than the size: nobody is to ask it.
    bytes[56..60].copy_from_slice(&[0xFF, 0xFF, 16, 255]);
    let kind: u32 = match order.kind {
        Kind::Fixed => 2,
        Kind::Dynamic => 3,
        Kind::Differencing => 4,
    };
    bytes[60..64].copy_from_slice(&kind.to_be_bytes());
    bytes[68..84].copy_from_slice(Uuid::new_v4().as_bytes());
    let sum = sum(&bytes, 64);
    bytes[64..68].copy_from_slice(&sum);
    bytes
}

fn utf16(text: &str, unit: fn(u16) -> [u8; 2]) -> Vec<u8> {
    text.encode_utf16().flat_map(unit).collect()
}

/// A part of the file whose place is drawn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Part {
    Header,
    Table,
    Locator(usize),
    Block(u64),
    /// Sectors that belong to nothing.
    Room(u64),
}

pub(crate) fn forge(store: &dyn Store, order: &Order, dice: &mut Dice) -> Forged {
    let mut canvas = Canvas::new(store);
    let held = order.draw(dice);
    if order.kind == Kind::Fixed {
        for (block, sectors) in &held {
            order.put_block(&mut canvas, block * order.block, *block, sectors, false);
        }
        let footer = footer(order, u64::MAX, dice);
        canvas.put(order.size, &footer[..if !order.plain && dice.one_in(8) { 511 } else { 512 }]);
        return Forged { held, log: false, wounded: false };
    }
    let bitmap = (order.block / SECTOR).div_ceil(8).next_multiple_of(SECTOR);
    let entries = order.blocks() + if dice.one_in(3) { dice.below(300) } else { 0 };
    let table = (entries * 4).next_multiple_of(SECTOR);
    let locators = locators(order, dice);
    let mut parts = vec![Part::Header, Part::Table];
    parts.extend((0..locators.len()).map(Part::Locator));
    let placed = held.iter().filter(|(_, sectors)| sectors.iter().any(|sector| *sector != Sector::Nothing));
    let mut blocks: Vec<_> = placed.map(|(block, _)| Part::Block(*block)).collect();
    dice.shuffle(&mut blocks);
    parts.append(&mut blocks);
    for _ in 0..dice.below(4) {
        let room = Part::Room(1 + dice.below(40));
        parts.insert(dice.below(parts.len() as u64 + 1) as usize, room);
    }
    if dice.one_in(2) {
        dice.shuffle(&mut parts);
    }
    let mut at = SECTOR;
    let mut places = Vec::new();
    let aligned = dice.one_in(2);
    for (index, part) in parts.iter().enumerate() {
        let len = match part {
            Part::Header => 1024,
            Part::Table => table,
            Part::Locator(which) => locators[*which].1.len().next_multiple_of(512) as u64,
            // The last block may be cut off behind the end of the disk.
            Part::Block(block) if index + 1 == parts.len() && !order.plain => bitmap + order.inside(*block),
            Part::Block(_) => bitmap + order.block,
            Part::Room(sectors) => sectors * SECTOR,
        };
        if aligned && matches!(part, Part::Block(_)) {
            at = (at + bitmap).next_multiple_of(4096) - bitmap;
        }
        places.push((*part, at));
        at += len;
    }
    let place = |part: Part| places.iter().find(|(found, _)| *found == part).expect("placed").1;
    let footer = footer(order, place(Part::Header), dice);
    let mut header = vec![0; 1024];
    header[..8].copy_from_slice(b"cxsparse");
    header[8..16].fill(0xFF);
    header[16..24].copy_from_slice(&place(Part::Table).to_be_bytes());
    header[24..28].copy_from_slice(&0x1_0000_u32.to_be_bytes());
    header[28..32].copy_from_slice(&(entries as u32).to_be_bytes());
    header[32..36].copy_from_slice(&(order.block as u32).to_be_bytes());
    if let Some((id, name)) = &order.parent {
        header[40..56].copy_from_slice(id.as_bytes());
        let full = utf16(&format!(r"D:\somewhere\else\{name}"), u16::to_be_bytes);
        header[64..64 + full.len()].copy_from_slice(&full);
    }
    for (index, (code, text)) in locators.iter().enumerate() {
        let entry = &mut header[576 + index * 24..][..24];
        entry[..4].copy_from_slice(&code[..]);
        entry[4..8].copy_from_slice(&(text.len().next_multiple_of(512) as u32).to_be_bytes());
        entry[8..12].copy_from_slice(&(text.len() as u32).to_be_bytes());
        entry[16..24].copy_from_slice(&place(Part::Locator(index)).to_be_bytes());
    }
    let header_sum = sum(&header, 36);
    header[36..40].copy_from_slice(&header_sum);
    let mut map = vec![0xFF; table as usize];
    let junk = order.differencing() && dice.one_in(2);
    for (part, at) in &places {
        match part {
            Part::Header => canvas.put(*at, &header),
            Part::Locator(which) => canvas.put(*at, &locators[*which].1),
            Part::Room(sectors) => canvas.put(*at, &vec![0xDD; *sectors as usize * 512]),
            Part::Table => (),
            Part::Block(block) => {
                map[*block as usize * 4..][..4].copy_from_slice(&((at / SECTOR) as u32).to_be_bytes());
                canvas.put(*at, &bits(order, &held[block], bitmap, dice));
                order.put_block(&mut canvas, at + bitmap, *block, &held[block], junk);
            }
        }
    }
    canvas.put(place(Part::Table), &map);
    let wound = if order.plain { 9 } else { dice.below(10) };
    if wound != 0 {
        canvas.put(0, &footer);
    }
    match wound {
        // The end is lost, and with it what a growing file has behind its last block.
        1 => store.set_len(at).expect("length"),
        2 => canvas.put(at, &footer[..511]),
        _ => canvas.put(at, &footer),
    }
    Forged { held, log: false, wounded: wound < 2 }
}

/// A block's bitmap. Without a parent the bits say nothing; but some readers ask them.
fn bits(order: &Order, sectors: &[Sector], len: u64, dice: &mut Dice) -> Vec<u8> {
    if !order.differencing() {
        let bits = if order.plain { 0xFF } else { dice.below(256) as u8 };
        return vec![bits; len as usize];
    }
    let mut bits = vec![0; len as usize];
    for (index, _) in sectors.iter().enumerate().filter(|(_, sector)| **sector != Sector::Nothing) {
        bits[index / 8] |= 0x80 >> (index % 8);
    }
    bits
}

/// The ways in which a child names its parent: code and text.
fn locators(order: &Order, dice: &mut Dice) -> Vec<(&'static [u8; 4], Vec<u8>)> {
    let Some((_, name)) = &order.parent else { return Vec::new() };
    let mut all = vec![(b"W2ru", utf16(&format!(r".\{name}"), u16::to_le_bytes))];
    if dice.one_in(2) {
        all.insert(0, (b"W2ku", utf16(&format!(r"D:\somewhere\else\{name}"), u16::to_le_bytes)));
    }
    if dice.one_in(3) {
        all.push((b"MacX", format!("file://./{name}").into_bytes()));
    }
    all
}
