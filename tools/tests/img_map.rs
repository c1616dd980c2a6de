//! `coblock img map` beside `qemu-img map`: the same images, the same words, the same output to the
//! letter.

mod support;

use support::{Programs, differs_but_for_causes, extents};

/// Runs every line through both programs.
fn same(lines: &[String]) {
    if let Some(programs) = Programs::with_images("extents-map", extents::make) {
        programs.compare(lines, |theirs, ours| theirs != ours);
    }
}

#[test]
fn command_lines_that_are_wrong() {
    let lines = [
        "map",
        "map raw base",
        "map -f",
        "map -q raw",
        "map --zzz raw",
        "map --output=foo raw",
        "map --output raw",
        "map --o=json raw",
        "map --image-opts -f qcow2 base",
        "map --object foo raw",
        "map --object foo,id=x raw",
        "map --object throttle-group raw",
        "map --object throttle-group,id=g,x-iops-total=-1 raw",
        "map --object throttle-group,id=g --object throttle-group,id=g raw",
        "map --object throttle-group,id=g -f raw raw",
        "map --image-opts driver=throttle,throttle-group=g,file.driver=file,file.filename=raw",
        "map --object throttle-group,id=g --image-opts \
         driver=throttle,throttle-group=g,file.driver=file,file.filename=raw",
        "map -s x raw",
        "map -s -1 raw",
        "map -s 8E raw",
        "map -s '' raw",
        "map -l x raw",
        "map -l -5 raw",
        "map --max-length raw",
        "map --start-offset=1.5x raw",
        "map -s x --output=foo",
        "map --output=foo -s x",
        "map nope",
        "map ''",
        "map sub",
        "map foo:bar",
        "map -f foo raw",
        "map -f qcow2 raw",
        "map -f qcow2 three",
        "map orphan",
        "map --output=json orphan",
        "map --output=json nope",
        "map --image-opts raw",
        "map --image-opts driver=qcow2",
        "map -U=1 raw",
    ];
    same(&lines.map(String::from));
}

#[test]
fn whole_images() {
    let mut lines = Vec::new();
    for image in extents::SOUND {
        for options in ["", "--output=json", "-f raw", "-U --output=json -f raw"] {
            lines.push(format!("map {options} {image}"));
        }
    }
    same(&lines);
}

#[test]
fn parts_of_images() {
    let mut lines = Vec::new();
    for image in extents::SOUND {
        for part in [
            "-s 70000 -l 100000",
            "-s 1M",
            "-l 65537",
            "-s 512 -l 0",
            "-s 100T",
            "-s 1100k -l 7E",
            "--start-offset=3M --max-length=511",
        ] {
            lines.push(format!("map --output=json {part} {image}"));
        }
        lines.push(format!("map -s 66000 -l 2M {image}"));
    }
    same(&lines);
}

#[test]
fn images_by_options() {
    let lines = [
        "map --image-opts driver=qcow2,file.filename=over",
        "map --image-opts driver=qcow2,file.driver=file,file.filename=over2 --output json",
        "map --image-opts file.filename=base",
        "map --image-opts driver=raw,offset=64k,file.filename=raw",
        "map --image-opts driver=raw,offset=64k,file.filename=raw --output=json",
        "map --image-opts driver=raw,offset=64k,size=100k,file.filename=raw --output=json",
        "map --image-opts driver=qcow2,file.filename=over,backing.driver=qcow2,\
         backing.file.filename=same --output=json",
        "map --image-opts driver=qcow2,file.filename=orphan,backing= --output=json",
        "map --output=json \"json:{'driver':'qcow2','file.filename':'orphan','backing':null}\"",
        "map --image-opts driver=qcow2,file.filename=over,backing.file.filename=base",
        "map --image-opts driver=qcow2,file.filename=over,backing.driver=raw",
        "map --image-opts driver=qcow2,file.filename=over,backing=base",
        "map --image-opts driver=qcow2,file.filename=over,backing.file.filename=nope",
        "map --image-opts driver=qcow2,file.filename=over,backing.driver=foo",
        "map --output=json null-co://",
        "map null-co://",
        "map --image-opts driver=null-co,size=1M --output=json",
        "map --image-opts driver=null-co,size=1M,read-zeroes=on --output=json",
        "map --output=json \
         'json:{\"driver\":\"qcow2\",\"file\":{\"driver\":\"file\",\"filename\":\"over\"}}'",
        "map \"json:{'driver':'raw','file.filename':'raw'}\"",
        "map --image-opts driver=raw,cache.direct=on,file.filename=u1000 --output=json",
        "map --image-opts driver=raw,cache.direct=on,file.filename=u70000 --output=json",
        "map --image-opts driver=raw,cache.direct=on,file.filename=u1000 --output=json -s 1001",
        "map --image-opts driver=raw,cache.direct=on,file.filename=raw --output=json",
        "map -f file raw",
        "map -f file --output=json three",
        "map file:raw",
        "map ./sub/../raw",
        "map ./sub/over",
        "map ./sub/../sub/over",
        "--trace enable=foo map raw",
    ];
    same(&lines.map(String::from));
}

/// What was found before the damage is told as by the reference, and the same sentence says what
/// was wrong; ours adds where.
#[test]
fn damaged_images() {
    let Some(programs) = Programs::with_images("extents-map", extents::make) else {
        return;
    };
    let mut lines = Vec::new();
    for image in extents::DAMAGED {
        for options in ["", "--output=json", "--output=json -s 64k", "-l 64k"] {
            lines.push(format!("map {options} {image}"));
        }
    }
    programs.compare(&lines, differs_but_for_causes);
}
