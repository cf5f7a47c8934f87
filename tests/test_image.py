"""Images as they are built, kept, checked and given up, by the real builder."""
import os, shutil, subprocess, sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import pytest
from common import environment, until
from rlm.cli import main
from rlm.image import FILES, Image, ImageError, Recipe, build_image, find_image, list_images, locked, remove_image, use_image

BUILDERS = all(map(shutil.which, ('mmdebstrap', 'sqfstar')))
builds = pytest.mark.skipif(not BUILDERS, reason='mmdebstrap and squashfs-tools are not installed')

@pytest.fixture(scope='session')
def image():
    "The image that all tests share, in the user's cache."
    if not BUILDERS: pytest.skip('mmdebstrap and squashfs-tools are not installed')
    return build_image()

@pytest.fixture
def cache(tmp_path, monkeypatch):
    "A cache folder of its own."
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path/'cache'))
    return tmp_path/'cache'/'rlm'/'images'

def copied(image, cache): # The image in another cache, its files writable
    shutil.copytree(image.path, cache/image.name)
    for k in FILES: os.chmod(cache/image.name/k, 0o644)
    return Image(cache/image.name, image.info)

def test_built_once(image):
    made = image.path.stat().st_ino, (image.path/'root').stat().st_mtime_ns
    assert build_image() == image.check() == find_image() and made == (image.path.stat().st_ino, (image.path/'root').stat().st_mtime_ns)
    assert 20e6 < image.size < 300e6 and image.info['recipe']['kind'] == 'debian'
    assert (image.path/'root').read_bytes()[:4] == b'hsqs' and oct((image.path/'root').stat().st_mode)[-3:] == '444'

@pytest.mark.parametrize('file', FILES)
@pytest.mark.parametrize('how', ['a byte', 'the end', 'gone'])
def test_damaged(image, cache, file, how):
    own = copied(image, cache)
    assert own.check() is own
    path = own.path/file
    if how == 'gone': path.unlink()
    else:
        with open(path, 'r+b') as f: f.seek(path.stat().st_size // 2); f.write(b'\1\2\3') if how == 'a byte' else f.truncate()
    with pytest.raises(ImageError, match=f'is damaged: its {file} .*rlm image build'): own.check()
    from rlm.vm import VM
    with pytest.raises(ImageError, match='is damaged'): VM(own.name, accel='tcg')

def test_nothing_there(cache, monkeypatch, capsys):
    from rlm.vm import VM, VMError
    with pytest.raises(VMError, match='there is no image for a virtual machine yet; make one: rlm image build'): VM()
    monkeypatch.setenv('PATH', '')
    with pytest.raises(ImageError, match='A Debian image needs mmdebstrap and sqfstar: apt install mmdebstrap squashfs-tools'): build_image(Recipe(suite='any', mirror='http://localhost:9'))
    with pytest.raises(ImageError, match='An Alpine image needs apk and mksquashfs'): build_image(Recipe(kind='alpine'))
    assert main(['image', 'use', 'nope']) == 1 and 'there is no image' in capsys.readouterr().err and main(['image', 'list']) == 0

def test_command(image, cache, capsys):
    paths = [str(image.path/k) for k in FILES]
    assert main(['image', 'use', *paths]) == 0
    name = capsys.readouterr().out.split()[0]
    assert main(['image', 'list']) == 0 and 'your own files' in (out := capsys.readouterr().out) and out.split()[0] == name == find_image().name
    assert find_image().check().digest == image.digest
    assert main(['image', 'rm', name]) == 0 and not list_images()

SMALL = "Recipe(packages=('tree',))"
BUILD = f'from rlm.image import *\nimage = build_image({SMALL})\nprint(image.name, image.path.stat().st_ino)'

@builds
def test_killed_and_two_at_once(cache, tmp_path, monkeypatch):
    "A builder that is killed leaves nothing that counts; of two that come after it, one builds."
    log, bin_ = tmp_path/'calls', tmp_path/'bin'
    bin_.mkdir()
    (bin_/'mmdebstrap').write_text(f'#!/bin/sh\necho $$ >> {log}\nexec {shutil.which("mmdebstrap")} "$@"\n'); (bin_/'mmdebstrap').chmod(0o755)
    env = environment() | dict(PATH=f'{bin_}:{os.environ["PATH"]}')
    start = lambda: subprocess.Popen([sys.executable, '-c', BUILD], stdout=subprocess.PIPE, text=True, env=env)
    p = start()
    until(log.exists)
    p.kill(); p.wait()
    assert not list_images() and list(cache.glob('*.part-*'))
    pid = int(log.read_text())
    until(lambda: not Path(f'/proc/{pid}').exists()) # Its helpers end with it
    two = [start(), start()]
    said = [o.communicate(timeout=500)[0] for o in two]
    assert said[0] == said[1] != '' and len(log.read_text().split()) == 2
    assert len(list_images()) == 1 and list_images()[0].check() and not list(cache.glob('*.part-*'))
    assert remove_image(said[0][:6]).name == said[0].split()[0] and not list_images()

@builds
def test_failing_build_leaves_nothing(cache):
    with pytest.raises(ImageError, match='could not be built; the builder said:\n'): build_image(Recipe(packages=('no-such-package',)))
    assert not [o for o in cache.iterdir() if o.suffix != '.lock']

def test_a_lock_is_for_one_and_leaves_no_file(tmp_path):
    holders, most, path = [], [], tmp_path/'a.lock'
    def work(i):
        with locked(path): holders.append(i); os.sched_yield(); most.append(len(holders)); holders.remove(i)
    with ThreadPoolExecutor(8) as pool: list(pool.map(work, range(400)))
    assert most == [1] * 400 and not list(tmp_path.iterdir())
    path.touch() # Of one that was killed
    work(0); assert not list(tmp_path.iterdir())
