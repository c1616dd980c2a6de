"""The coroutines of a program, in gdb: live process or core file, with or without debug information.

    (gdb) source coroutine/tools/gdb_coroutines.py
    (gdb) coroutines             every live coroutine: life, name, state, where created and suspended
    (gdb) coroutines bt          the same, and the calls of each suspended one
    (gdb) coroutines bt LIFE     only that one

Nothing in the program is changed, and nothing in it runs. Backtraces need x86-64.
"""

import gdb
import gdb.unwinder

SYMBOL = "coblock_coroutine::stack::debugger::LAYOUT"
VERSION = 2
# As in src/stack/debugger.rs.
FIELDS = """version arenas arena_low arena_class arena_carved arena_placed arena_next guard
    smallest_stack colours colour_step control_size phase suspended raw raw_size life thread name
    created suspended_at waits_for""".split()
# As in `enum Phase`, src/stack/control.rs.
PHASES = ["not started", "suspended", "waiting for an operation", "woken and queued",
          "running", "running", "waiting for another coroutine that it has entered", "finished",
          "finished"]
SUSPENDED, WAITING, QUEUED = 1, 2, 3
KEPT = 1 << 63
MOST_FRAMES = 200
# The first frames on a stack, below which there is nothing to see.
ROOTS = "coblock_coroutine::coroutine::run<", "stack_init_trampoline"


def read(address, size):
    return bytes(gdb.selected_inferior().read_memory(address, size))


def word(address):
    return int.from_bytes(read(address, 8), "little")


def text(address):
    """A `&str` that lies at `address`."""
    at, length = word(address), word(address + 8)
    return read(at, min(length, 4096)).decode(errors="replace") if length else ""


def place(address):
    """A `&Location` that lies at `address`."""
    at = word(address)
    return "%s:%d" % (text(at), int.from_bytes(read(at + 16, 4), "little"))


def layout_address():
    language = gdb.parameter("language")
    gdb.execute("set language c", to_string=True)
    try:
        return int(gdb.parse_and_eval("(unsigned long) &'%s'" % SYMBOL))
    except gdb.error:
        # Without debug information the symbol's name ends in a hash.
        told = gdb.execute("info variables %s" % SYMBOL, to_string=True)
        for line in told.splitlines():
            if line.startswith("0x") and SYMBOL in line:
                return int(line.split()[0], 16)
        raise gdb.GdbError("no coroutines in this program: it has no symbol %s" % SYMBOL)
    finally:
        gdb.execute("set language %s" % language, to_string=True)


def layout():
    at = layout_address()
    table = {field: word(at + 8 * n) for n, field in enumerate(FIELDS)}
    if table["version"] != VERSION:
        raise gdb.GdbError("this script is for version %d of the layout, the program has %d"
                           % (VERSION, table["version"]))
    return table


class Coroutine:
    def __init__(self, table, at, low):
        self.at, self.low = at, low
        self.life = word(at + table["life"])
        self.thread = word(at + table["thread"])
        self.phase = read(at + table["phase"], 1)[0]
        self.suspended = read(at + table["suspended"], 1)[0] != 0
        self.table = table

    def live(self):
        return self.life != 0 and self.life & KEPT == 0 and self.phase < len(PHASES)

    def rests(self):
        return self.suspended and self.phase in (SUSPENDED, WAITING, QUEUED)

    def describe(self):
        table, at = self.table, self.at
        line = "life %d '%s': %s" % (self.life, text(at + table["name"]), PHASES[self.phase])
        if self.phase == WAITING:
            line += " '%s'" % text(at + table["waits_for"])
        if self.rests():
            line += " at %s" % place(at + table["suspended_at"])
        line += "; created at %s" % place(at + table["created"])
        return line + ("; thread %d" % self.thread if self.thread else "; no thread yet")

    def stack_pointer(self):
        """Where its registers lie: of the words that the switch keeps, two point into the stack; one
        is where the stack began, the other one, below it, where it stands."""
        first = self.at + self.table["raw"]
        words = [word(first + n) for n in range(0, self.table["raw_size"], 8)]
        inside = [w for w in words if self.low <= w < self.at]
        return min(inside) if inside else None


def coroutines(table):
    """Every live coroutine."""
    arena = word(table["arenas"])
    while arena:
        low = word(arena + table["arena_low"])
        size = (table["smallest_stack"] << word(arena + table["arena_class"])) + table["guard"]
        carved = word(arena + table["arena_carved"])
        placed = word(arena + table["arena_placed"])
        for first in range(0, carved, 64):
            bits = word(placed + first // 8)
            for index in range(first, first + 64):
                if bits >> (index - first) & 1:
                    slot = low + index * size
                    colour = index % table["colours"] * table["colour_step"]
                    at = slot + size - colour - table["control_size"]
                    coroutine = Coroutine(table, at, slot)
                    if coroutine.live():
                        yield coroutine
        arena = word(arena + table["arena_next"])


class FrameId:
    def __init__(self, sp, pc):
        self.sp, self.pc = sp, pc


class ToCoroutine(gdb.unwinder.Unwinder):
    """While it has a goal, the caller of the innermost frame is the place where that coroutine
    rests; so gdb's own unwinding goes on from there."""

    def __init__(self):
        super().__init__("coblock coroutines")
        self.goal = None
        self.top = None

    def __call__(self, pending):
        if self.goal is None:
            return None
        here = int(pending.read_register("rsp")), int(pending.read_register("rip"))
        if here != self.top:
            return None
        # What `suspend` has pushed: return address, rbx, rbp.
        sp = self.goal
        known = pending.create_unwind_info(FrameId(gdb.Value(sp), gdb.Value(here[1])))
        kind = gdb.lookup_type("unsigned long")
        for register, value in [("rip", word(sp)), ("rbx", word(sp + 8)),
                                ("rbp", word(sp + 16)), ("rsp", sp + 24)]:
            known.add_saved_register(register, gdb.Value(value).cast(kind))
        return known

    def frames(self, sp):
        """The frames of the coroutine whose registers lie at `sp`, the innermost first."""
        innermost = gdb.newest_frame()
        while innermost.type() == gdb.INLINE_FRAME and innermost.older():
            innermost = innermost.older()
        self.top = int(innermost.read_register("rsp")), int(innermost.read_register("rip"))
        self.goal = sp
        gdb.invalidate_cached_frames()
        try:
            frame = gdb.newest_frame()
            # The thread's own innermost function, with what is inlined into it.
            while frame.type() == gdb.INLINE_FRAME:
                frame = frame.older()
            frame = frame.older()
            number = 0
            while frame is not None and frame.is_valid() and number < MOST_FRAMES:
                if (frame.name() or "").startswith(ROOTS):
                    return
                yield "  #%-3d 0x%016x in %s%s" % (number, frame.pc(), frame.name() or "??",
                                                   source_of(frame))
                frame = frame.older()
                number += 1
        finally:
            self.goal = None
            gdb.invalidate_cached_frames()


def source_of(frame):
    line = frame.find_sal()
    return " at %s:%d" % (line.symtab.filename, line.line) if line.symtab else ""


class Coroutines(gdb.Command):
    """coroutines [bt [LIFE]]: the live coroutines of the program, with their calls."""

    def __init__(self, unwinder):
        super().__init__("coroutines", gdb.COMMAND_STACK)
        self.unwinder = unwinder

    def invoke(self, argument, from_tty):
        words = argument.split()
        if words and (words[0] != "bt" or len(words) > 2):
            raise gdb.GdbError("usage: coroutines [bt [LIFE]]")
        only = int(words[1]) if len(words) == 2 else None
        found = sorted(coroutines(layout()), key=lambda coroutine: coroutine.life)
        for coroutine in found:
            if only is not None and coroutine.life != only:
                continue
            print(coroutine.describe())
            sp = coroutine.stack_pointer()
            if words and coroutine.rests() and sp is not None:
                for line in self.unwinder.frames(sp):
                    print(line)
        if only is None:
            print("%d coroutines" % len(found))
        elif all(coroutine.life != only for coroutine in found):
            raise gdb.GdbError("no coroutine has life %d" % only)


UNWINDER = ToCoroutine()
gdb.unwinder.register_unwinder(None, UNWINDER, replace=True)
Coroutines(UNWINDER)
