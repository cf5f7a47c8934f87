"""Virtual machines for real: QEMU's own translation, the image of this machine's Debian."""
import hashlib, os, signal, subprocess, sys, threading, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import pytest
from common import HANG, block, environment, given_time, in_child, tree, until
from rlm import NANO, ScriptLM, exec_code, rlm_run
from rlm import vm as module
from rlm.image import FILES, ImageError, build_image, cache_dir, use_image
from rlm.vm import VM, SESSIONS, SessionsUsedUp, VMError

@pytest.fixture(scope='module')
def image():
    try: return build_image()
    except ImageError as e: pytest.skip(str(e))

@pytest.fixture(scope='module')
def vm(image):
    try: vm = VM(image, accel='tcg')
    except VMError as e: pytest.skip(str(e))
    with vm: yield vm

@pytest.fixture
def ns(vm):
    with vm.ns() as ns: yield ns

def run(code, ns, **kw): # What a block printed; its error fails the test
    res = exec_code(code, ns, **kw)
    assert res.error is None, res.stderr
    return res.stdout

def exists(pid): # Does this process run? One that has ended and was not waited for does not
    try: return Path(f'/proc/{pid}/stat').read_text().split()[2] != 'Z'
    except FileNotFoundError: return False

def machines(): # PIDs of the QEMUs of this process
    mine = {int(p) for t in Path('/proc/self/task').iterdir() for p in (t/'children').read_text().split()}
    return {p for p in mine if exists(p) and b'qemu' in Path(f'/proc/{p}/cmdline').read_bytes()}

def test_tools(ns):
    "All that the prompt of a bash block may count on."
    for o in 'rg jq fd file tree tar unzip gzip sqlite3 git diff pdftotext find sort bash python3 awk sed'.split():
        assert run(f'command -v {o}', ns, lang='bash').strip(), o
    script = '''cd; mkdir d; echo '{"a": [1, 2]}' > d/x.json; jq .a[1] d/x.json; rg -l a d; fd json; tar czf d.tgz d; file -b d.tgz | cut -c1-4
sqlite3 :memory: 'select 6 * 7'; git init -q g && tree -a -L 1 --noreport d; diff <(echo 1) <(echo 1) && echo same'''
    assert run(script, ns, lang='bash').split() == '2 d/x.json d/x.json gzip 42 d └── x.json same'.split()

def test_pdf(ns):
    lines = ['%PDF-1.1', '1 0 obj<</Type/Catalog/Pages 2 0 R>>endobj', '2 0 obj<</Type/Pages/Kids[3 0 R]/Count 1>>endobj', '3 0 obj<</Type/Page/Parent 2 0 R'
        '/MediaBox[0 0 200 99]/Contents 4 0 R/Resources<</Font<</F 5 0 R>>>>>>endobj', '4 0 obj<</Length 41>>stream', 'BT /F 12 Tf 9 9 Td (The keeper was Ada) Tj ET',
        'endstream endobj', '5 0 obj<</Type/Font/Subtype/Type1/BaseFont/Helvetica>>endobj', 'trailer<</Root 1 0 R>>']
    ns['pdf'] = '\n'.join(lines).encode()
    assert run('open("/tmp/a.pdf", "wb").write(pdf); None', ns) == '' and 'The keeper was Ada' in exec_code('pdftotext a.pdf -', ns, lang='bash').stdout

def test_what_is_inside(ns):
    "No network but a loopback of its own, a read-only system, no rights, and nothing of the host's."
    assert run('import os, socket; print(os.getuid() >= 100_000, [n for _, n in socket.if_nameindex()], os.cpu_count())', ns) == "True ['lo'] 2\n"
    assert run('s = socket.create_server(("127.0.0.1", 0)); c = socket.create_connection(s.getsockname()); c.send(b"x")', ns) == '1\n'
    assert 'CapEff:\t0000000000000000' in run('print(open("/proc/self/status").read())', ns) and 'NoNewPrivs:\t1' in run('print(open("/proc/self/status").read())', ns)
    for path in ('/x', '/etc/x', '/usr/x', '/run/x', '/dev/x', '/proc/sysrq-trigger', '/sys/power/state', '/dev/vda', '/dev/vport1p1', '/dev/mem'):
        assert exec_code(f'open({path!r}, "w")', ns).error.startswith(('OSError', 'PermissionError')), path
    assert exec_code('open("/dev/vda", "rb").read(1)', ns).error.startswith('PermissionError')

def test_sessions_do_not_see_each_other(vm, ns):
    with vm.ns() as other:
        run('import os, socket; open("/tmp/mine", "w").write("x"); s = socket.socket(socket.AF_UNIX); s.bind("\\0name"); s.listen(); print(os.getpid())', ns)
        pid, uid = run('print(os.getpid(), os.getuid())', ns).split()
        run('import os, socket', other)
        assert run('print(os.listdir("/tmp"), os.listdir("/dev/shm"), os.path.exists(f"/proc/{%s}/cmdline"))' % pid, other) == '[] [] False\n'
        assert exec_code(f'os.kill({pid}, 9)', other).error.startswith('PermissionError')
        assert exec_code('socket.socket(socket.AF_UNIX).connect("\\0name")', other).error.startswith('ConnectionRefused')
        assert run('os.getuid()', other).strip() != uid and run('1', ns) == '1\n'

def test_clones_draw_different_numbers_at_the_right_time(image):
    "Two machines from one template, and two sessions of each."
    draw, drawn = 'import os, random, time, uuid\nprint(random.random(), os.urandom(8).hex(), uuid.uuid4(), time.time())', []
    for _ in range(2):
        with VM(image, accel='tcg') as vm, vm.ns() as a, vm.ns() as b:
            for o in (a, b):
                t0 = time.time()
                *numbers, now = run(draw, o).split()
                assert t0 - 2 < float(now) < time.time() + 2
                drawn += numbers
    assert len(set(drawn)) == len(drawn) == 12

@pytest.mark.parametrize('value', ['é\U0001f600x' * 400_000, b'\0\xff' * 1_000_000, 'a' * 2**20, [f'line {i}' for i in range(9)], ['line'] * 2_100_000],
    ids=['text', 'bytes', 'a megabyte', 'small', 'many'])
def test_disk(vm, ns, value):
    "Large values come in by a disk, whole, and the disk goes out again."
    ns['x'] = value
    kind = type(value).__name__
    assert run('print(type(x).__name__, len(x))', ns) == f'{kind} {len(value)}\n'
    if kind != 'list':
        data = value if kind == 'bytes' else value.encode()
        assert run(f'import hashlib; print(hashlib.sha256({"x" if kind == "bytes" else "x.encode()"}).hexdigest())', ns).strip() == hashlib.sha256(data).hexdigest()
    assert [o['node-name'] for o in vm.qemu.qmp('query-named-block-nodes')] == ['root'] and len(vm.places) == module.DISKS
    assert run('import glob; print(glob.glob("/sys/block/vd*"))', ns) == "['/sys/block/vda']\n"

def test_many_disks_at_once(vm):
    with ThreadPoolExecutor(8) as pool:
        spaces = [vm.ns() for _ in range(8)]
        list(pool.map(lambda i: spaces[i].bind_context(str(i) * 2_000_000), range(8)))
        assert [run('context[-1], len(context)', o) for o in spaces] == [f"('{i}', 2000000)\n" for i in range(8)]
        for o in spaces: o.close()

def test_context_comes_back(ns):
    ns.bind_context('w ' * 1_000_000)
    run('y = 1', ns); ns.kill()
    res = exec_code('len(context)', ns)
    assert res.stdout == '2000000\n' and 'context' in res.notes[0] and 'y' not in ns

def test_sessions_are_bounded_and_used_again(vm):
    "The last one is refused and not waited for: parents keep theirs while their children work."
    before = len(vm.links)
    spaces = [vm.ns() for _ in range(SESSIONS - before)]
    with pytest.raises(SessionsUsedUp, match=f'all {SESSIONS} sessions') as e: spaces[0].child()
    assert e.value.sessions == SESSIONS
    res = rlm_run('q', 'c', spaces[0], model=tree([block('x = rlm_query_batched(["kid 1", "kid 2"])\nprint(x)', 'FINAL_VAR(x)')], kid=[block('1', 'FINAL(hi)')]))
    assert res.answer.count('sessions of the virtual machine are in use') == 2, res
    spaces.pop().close()
    spaces.append(spaces[0].child())
    for o in spaces: o.close()
    until(lambda: len(vm.links) == before)

def test_twenty_children_are_twenty_sessions(vm, ns):
    seen = []
    def kid(msgs):
        seen.append(len(vm.links))
        return block('import os; me = str(os.getuid())', 'FINAL_VAR(me)')
    root = block('x = rlm_query_batched([f"kid {i}" for i in range(20)])\nprint(len(set(x)))', 'FINAL_VAR(x)')
    res = rlm_run('q', 'c', ns, model=tree([root], kid=[kid]), limits=dict(max_concurrency=20))
    assert len(res.value) == 20 and res.stop == 'answer' and not any('Error' in o for o in res.value), res.value
    assert max(seen) > 2 and len(set(res.value)) > 2
    until(lambda: len(vm.links) == 1)

def test_parallel_calls_from_threads_of_the_guest(ns):
    "Eight calls meet at a barrier: none of them waits for another."
    barrier = threading.Barrier(8)
    def sub(msgs): barrier.wait(HANG); return msgs[-1]['content'].upper()
    code = '''
        from concurrent.futures import ThreadPoolExecutor
        with ThreadPoolExecutor(8) as pool: x = list(pool.map(llm_query, [f"call {i}" for i in range(8)]))'''
    res = rlm_run('q', 'c', ns, model=ScriptLM([block(code, 'FINAL_VAR(x)')]), sub_model=sub)
    assert res.value == [f'CALL {i}' for i in range(8)] and len(res.iterations[0].code_blocks[0].result.llm_calls) == 8

def test_nano_end_to_end(ns):
    "Metadata, bash beside Python, parallel children with sessions of their own, an answer as data."
    text = '\n'.join(f'{i} {"needle" if i % 997 == 0 else "hay"}' for i in range(100_000))
    first = block('open("/tmp/all", "w").write(prompt); print(prompt[:50] * 99)', lang='python')
    second = block('rg -n needle all > found; wc -l < found', lang='bash')
    third = block('''
        rows = open("/tmp/found").read().splitlines()
        from concurrent.futures import ThreadPoolExecutor
        with ThreadPoolExecutor(4) as pool: kids = list(pool.map(lambda i: rlm_query(f"kid {i}", rows=len(rows)), range(4)))
        Final = dict(rows=len(rows), kids=kids)''', lang='python')
    res = rlm_run('How many?', text, ns, model=tree([first, second, third], kid=[block('Final = prompt.split()[-1]', lang='python')]), protocol=NANO)
    assert res.value == dict(rows=101, kids=['101'] * 4), res.answer
    shown = '\n'.join(m['content'] for m in res.messages if m['role'] == 'user')
    assert '"chars": 4951' in shown and shown.count('hay') < 200 and len(res.children) == 4

def test_disk_full_inside(ns):
    code = 'n = 0\ntry:\n    with open("/tmp/fill", "wb") as f:\n        while True: n += f.write(bytes(1 << 20))\nexcept OSError as e: print(e.errno)'
    assert run('kept = 1\n' + code, ns) == '28\n' and 100 < int(run('n >> 20', ns)) < 800
    assert run('import os; os.remove("/tmp/fill"); open("/tmp/x", "w").write("ok"); kept', ns) == '1\n'

def test_memory_of_a_session(image):
    "A cap of its own; the other session lives on."
    with VM(image, accel='tcg', session_memory=200) as vm, vm.ns() as a, vm.ns() as b:
        run('kept = 1', b)
        assert 'SIGKILL' in exec_code('x = []\nwhile True: x.append(bytes(1 << 20) + b"x")', a).error
        assert run('kept', b) == '1\n' and run('2', a) == '2\n'
        assert 'exit code' in exec_code('python3 -c "x = b\'x\' * (1 << 29)"', b, lang='bash').stderr and run('kept', b) == '1\n'   # only that process

def test_interrupt_and_timeout(ns):
    res, _ = given_time(lambda seconds: exec_code('kept = 1\nwhile True: pass', ns, timeout=seconds), lambda res: 'kept' in ns, 1)
    assert 'stopped after' in res.error and run('kept', ns) == '1\n'
    assert 'stopped after' in exec_code('sleep 600', ns, lang='bash', timeout=1).error and run('kept', ns) == '1\n'
    hung, _ = given_time(lambda seconds: exec_code('sum(__import__("itertools").repeat(1))', ns, timeout=seconds), lambda res: res.error.startswith('SessionLost'), 1)
    assert hung.error.startswith('SessionLost') and 'kept' not in ns

def test_machine_killed_in_a_block(image):
    "With a call to the host open: the block says so, and the run goes on in a new machine with its context."
    with VM(image, accel='tcg') as vm, vm.ns() as ns:
        first, asked = vm.qemu.proc.pid, threading.Event()
        def sub(msgs): asked.set(); until(lambda: not exists(first)); return 'late'
        threading.Thread(target=lambda: (asked.wait(600), os.kill(first, signal.SIGKILL)), daemon=True).start()
        replies = [block('x = 1\ny = llm_query("hm")'), block('z = len(context), "x" in globals()', 'FINAL_VAR(z)')]
        res = rlm_run('q', 'context ' * 300_000, ns, model=ScriptLM(replies), sub_model=sub)
        lost = res.iterations[0].code_blocks[0].result
        assert lost.error.startswith('SessionLost') and 'machine' in lost.error and 'context' in lost.notes[0]
        assert res.value in ([2_400_000, False], (2_400_000, False)) and vm.qemu.proc.pid != first

HOST = '''
import os, sys, threading
from rlm import exec_code
from rlm.vm import VM
vm = VM(accel='tcg')
ns = vm.ns()
ns['x'] = 'x' * 2_000_000
print(vm.qemu.proc.pid, flush=True)
'''

@pytest.mark.parametrize('end', ['exec_code("while True: pass", ns)', 'os._exit(3)', 'sys.exit()', 'threading.Thread(target=exec_code, args=("while True: pass", ns), daemon=True).start()'],
    ids=['killed', 'exit at once', 'exit', 'exit in a block'])
def test_nothing_is_left_of_a_host_that_ends(vm, tmp_path, end):
    p = subprocess.Popen([sys.executable, '-c', HOST + end], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment() | dict(TMPDIR=str(tmp_path)))
    qemu = int(p.stdout.readline())
    assert end[:4] != 'exec' or exists(qemu)
    if end[:4] == 'exec': p.kill()
    assert p.wait(HANG) in (0, 3, -9) and p.stderr.read() == ''
    until(lambda: not exists(qemu))
    assert not list(tmp_path.iterdir())

def test_closing_leaves_nothing(image):
    with VM(image, accel='tcg') as vm: vm.ns().close() # Whatever is made once is there now
    count = lambda: len(os.listdir('/proc/self/fd'))
    until(lambda: vm.agent.gone)
    before, threads = count(), threading.active_count()
    vm = VM(image, accel='tcg')
    ns, pid = vm.ns(), vm.qemu.proc.pid
    ns['x'] = 'x' * 2_000_000
    assert pid in machines() and exec_code('1', ns).stdout == '1\n'
    vm.close()
    assert not exists(pid)
    with pytest.raises(VMError, match='is closed'): vm.ns()
    ns.close()
    until(lambda: count() <= before and threading.active_count() <= threads)

@pytest.mark.parametrize('broken', FILES)
def test_a_failed_start_leaves_nothing(image, tmp_path, monkeypatch, broken):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    paths = {k: str(image.path/k) for k in FILES}
    (tmp_path/'junk').write_bytes(os.urandom(100_000)); paths[broken] = str(tmp_path/'junk')
    before = machines()
    own = use_image(*paths.values())
    with pytest.raises(VMError, match='did not (boot|start)'): VM(own, accel='tcg')
    assert machines() == before and not list((tmp_path/'rlm'/'templates').iterdir())

def test_own_files(image, tmp_path, monkeypatch):
    "`rlm image use`: the three files from anywhere."
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    use_image(*(str(image.path/k) for k in FILES))
    with VM(accel='tcg') as vm, vm.ns() as ns: assert run('6 * 7', ns) == '42\n'

def test_templates(image, vm):
    "What decides is in the name; one that is damaged is made anew."
    name = lambda **kw: module.template_name(module.replace(vm.spec, **kw), b'x')
    assert len({name(), name(memory=2048), name(cpus=1), name(accel='kvm'), module.template_name(vm.spec, b'y')}) == 5
    with VM(image, accel='tcg', memory=512) as small, small.ns() as ns: assert int(run('import os; print(os.sysconf("SC_PHYS_PAGES") * 4096 >> 20)', ns)) < 512
    initrd = (image.path/'initrd').read_bytes() + module.cpio(module.guest_files())
    path = cache_dir('templates')/module.template_name(small.spec, initrd)
    (path/'state').write_bytes(b'junk')
    with VM(image, accel='tcg', memory=512) as again, again.ns() as ns: assert run('1', ns) == '1\n'
    assert (path/'state').stat().st_size > 1000

def test_acceleration(image, monkeypatch, tmp_path):
    "One that does not boot in time is given up for TCG, and noted."
    monkeypatch.setattr(module, '_kvm', lambda: True)
    monkeypatch.setitem(module.boot_time, 'kvm', .001)
    bad = module._bad_kvm()
    monkeypatch.setattr(module, '_bad_kvm', lambda: tmp_path/'no-kvm')
    assert module._accels('auto') == ['kvm', 'tcg']
    with VM(image) as vm, vm.ns() as ns: assert vm.spec.accel == 'tcg' and run('1', ns) == '1\n'
    assert (tmp_path/'no-kvm').exists() and module._accels('auto') == ['tcg'] and 'no-kvm' in bad.name
    with pytest.raises(ValueError, match='auto, kvm or tcg'): VM(image, accel='gpu')

@pytest.mark.parametrize('options, error, words', [(dict(memory='1G'), TypeError, '`memory` must be a whole number'), (dict(memory=0), ValueError, '`memory` must be from 1'),
    (dict(memory=10**7), ValueError, '`memory` is 10,000,000 MB, and this machine has'), (dict(cpus=0), ValueError, '`cpus`'), (dict(session_memory=0), ValueError, '`session_memory`'),
    (dict(processes=0), ValueError, '`processes`')], ids=lambda o: str(o) if isinstance(o, dict) else '')
def test_bad_options_are_refused_at_the_start(options, error, words):
    with pytest.raises(error, match=words): VM(**options)

def test_no_qemu(image, monkeypatch):
    monkeypatch.setenv('PATH', '')
    with pytest.raises(VMError, match='A virtual machine needs qemu-system-x86_64: apt install qemu-system-x86'): VM(image)

def test_started_on_a_thread_that_ends_and_left_alone_by_forks(image):
    made = []
    t = threading.Thread(target=lambda: made.append(VM(image, accel='tcg'))); t.start(); t.join()
    with made[0] as vm, vm.ns() as ns:
        assert in_child(lambda: (ns.close(), vm.close()) and 1) == 1
        assert run('6 * 7', ns) == '42\n'
